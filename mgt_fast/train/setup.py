"""What both kinds of run do first: device, threads, seed, and the crystals of each part."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoint import CheckpointMeta
from ..data import CrystalDataset
from ..data.store import MANIFEST
from ..kernels import resolve_backend
from .config import ConfigError, RunConfig

# What a checkpoint fixes about the network that continues from it, and about its graphs.
ENCODER_SIZES = ("channels", "num_scalars", "num_vectors", "num_blocks")
GRAPH_KEYS = ("max_neighbors", "compat")


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


def _in_yaml(value: int | str | None) -> str:
    return "null" if value is None else str(value)


def manifest_digest(dataset: CrystalDataset) -> str:
    """Return the SHA-256 of a dataset's manifest, which holds those of its shards."""
    return hashlib.sha256((dataset.path / MANIFEST).read_bytes()).hexdigest()


def describe_parts(sizes: Mapping[str, int]) -> str:
    """Say how many crystals each part has, as "train 5481, val 434"."""
    return ", ".join(f"{name or '(no part)'} {size}" for name, size in sizes.items())
