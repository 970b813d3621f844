"""What both kinds of run do first: device, threads, seed, memory, and the dataset on every rank."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ..checkpoint import CheckpointMeta
from ..data import CrystalDataset
from ..data.counts import edge_counts, require_graphs
from ..data.manifest import hash_file
from ..data.resident import ResidentCrystals
from ..data.store import MANIFEST
from ..distributed import Ranks
from ..kernels import resolve_backend
from ..memory import bytes_per_edge, memory_limit
from .config import ConfigError, RunConfig
from .feed import GraphSource
from .plan import MemoryBudget

# What a checkpoint fixes about the network that continues from it, and about its graphs.
ENCODER_SIZES = ("channels", "num_scalars", "num_vectors", "num_blocks")
GRAPH_KEYS = ("max_neighbors", "compat", "shell_tolerance")


def start_torch(config: RunConfig) -> torch.device:
    """Set threads, seed and the precision of float32 products; return the device to run on.

    Raises:
        ConfigError: if there is no such device, or the backend cannot compute on it.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    device = resolve_device(config.device)
    try:
        resolve_backend(config.backend, device)
    except RuntimeError as error:
        raise ConfigError(str(error)) from error
    return device


def open_dataset(path: Path | None, ranks: Ranks) -> CrystalDataset:
    """Open a dataset on every rank; one rank a machine verifies its hashes before any crystal is used."""
    verifies = ranks.size == 1 or int(os.environ.get("LOCAL_RANK", ranks.rank)) == 0
    with ranks.together():
        dataset = CrystalDataset.open(path, verify=verifies)
    ranks.require_equal({"manifest's SHA-256": manifest_digest(dataset)}, "dataset")
    return dataset


def planned_edges(
    config: RunConfig, dataset: CrystalDataset, indices: np.ndarray, ranks: Ranks, console: Console | None
) -> np.ndarray:
    """Return the number of edges of each crystal of a dataset, (n,) int32, by which batches are planned.

    Those of crystals not among `indices`, (k,) int64, may be 0.

    Raises:
        RankError: if another rank failed.
        ValueError: if one of the crystals `indices` has no graph.
    """
    graphs = {name: getattr(config.data, name) for name in GRAPH_KEYS}
    shown = console if ranks.is_main else None
    edges = edge_counts(dataset, **graphs, console=shown, indices=indices, ranks=ranks)
    with ranks.together():
        require_graphs(dataset, edges, indices, **graphs)
    return edges


def memory_budget(config: RunConfig, device: torch.device, ranks: Ranks, resident: int = 0) -> MemoryBudget:
    """Return what a training step may take on a rank, and what an edge takes (see `mgt_fast.memory`).

    Args:
        config: of the run.
        device: that it computes on.
        ranks: of the run; what the smallest of their machines has counts for all, so that all plan alike.
        resident: bytes of crystals that live there.
    """
    limit = config.memory_gib * 2**30 if config.memory_gib else memory_limit(device) - resident
    limit = min(ranks.gather(limit))
    backend = resolve_backend(config.backend, device)
    whole, recomputed = (
        bytes_per_edge(
            config.model,
            backend,
            config.precision,
            recompute,
            edges_per_atom=config.data.max_neighbors,
        )
        for recompute in (False, True)
    )
    return MemoryBudget(limit, whole, recomputed)


def graph_source(
    config: RunConfig,
    dataset: CrystalDataset,
    device: torch.device,
    indices: np.ndarray,
    ranks: Ranks,
) -> GraphSource:
    """Return what builds the graphs of the crystals `indices`, from device memory if they are to be there.

    Raises:
        ConfigError: if they shall be resident on a device that is no CUDA device, or with "comformer" graphs.
    """
    data = config.data
    source = GraphSource(
        dataset, data.max_neighbors, data.compat, device, shell_tolerance=data.shell_tolerance
    )
    possible = device.type == "cuda" and data.compat is None
    if data.resident and not possible:
        raise ConfigError(
            "data.resident = true needs a CUDA device and data.compat = null; the run computes on "
            f"{device} with data.compat = {_in_yaml(data.compat)}"
        )
    wanted = data.resident
    if wanted is None:
        wanted = possible and ResidentCrystals.fits(dataset, device, indices)
    wanted = all(ranks.gather(wanted))  # memory is planned for all ranks alike
    return replace(source, resident=ResidentCrystals(dataset, device, indices)) if wanted else source


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """Return the context that a training step's network runs in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def resolve_device(name: str) -> torch.device:
    """Return the device that "auto" (CUDA if there is any), "cpu" or "cuda" means.

    Raises:
        ConfigError: for another name, or if CUDA is asked for and there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device = {name!r}; choose auto, cpu or cuda")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda', but torch sees no CUDA device; choose cpu")
    return torch.device(name)


def values_from_checkpoint(meta: CheckpointMeta) -> dict[str, Any]:
    """Return what a run that continues from a checkpoint takes from it, for `load_config(base=...)`."""
    network = {name: getattr(meta.model, name) for name in (*ENCODER_SIZES, "views")}
    return {"model": network, "data": {name: getattr(meta, name) for name in GRAPH_KEYS}}


def check_fits_checkpoint(config: RunConfig, meta: CheckpointMeta) -> None:
    """Raise ConfigError if sizes or graphs contradict the checkpoint that the run continues from."""
    pairs = {
        f"model.{name}": (getattr(config.model, name), getattr(meta.model, name)) for name in ENCODER_SIZES
    }
    pairs |= {f"data.{name}": (getattr(config.data, name), getattr(meta, name)) for name in GRAPH_KEYS}
    faults = [
        f"{key} = {_in_yaml(ours)}, but the checkpoint has {_in_yaml(theirs)}"
        for key, (ours, theirs) in pairs.items()
        if ours != theirs
    ]
    if faults:
        raise ConfigError("; ".join(faults) + "; leave these keys out to take the checkpoint's")


def _in_yaml(value: float | str | None) -> str:
    return "null" if value is None else str(value)


def manifest_digest(dataset: CrystalDataset) -> str:
    """Return the SHA-256 of a dataset's manifest, which holds those of its shards."""
    return hash_file(dataset.path / MANIFEST)


def split_digest(config: RunConfig, ranks: Ranks) -> str | None:
    """Return the SHA-256 of the file that names a run's parts, None where there is none.

    Raises:
        RankError: if ranks see different files.
    """
    if config.data.split_file is None:
        return None
    with ranks.together():
        digest = hash_file(config.data.split_file)
    ranks.require_equal({"SHA-256 of data.split_file": digest}, "parts")
    return digest


def crystals_digest(manifest: str, split: str | None) -> str:
    """Return what tells the crystals of a run and their parts from others', for its saved states."""
    return manifest if split is None else f"{manifest}, split file {split}"


def describe_device(device: torch.device, ranks: Ranks) -> str:
    """Say where a run computes, as "cpu" or "cuda, 8 ranks"."""
    return f"{device}, {ranks.size} ranks" if ranks.size > 1 else str(device)


def describe_parts(sizes: Mapping[str, int]) -> str:
    """Say how many crystals each part has, as "train 5481, val 434"."""
    return ", ".join(f"{name or '(no part)'} {size}" for name, size in sizes.items())
