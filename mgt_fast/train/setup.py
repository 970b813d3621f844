"""What both kinds of run do first: device, threads, seed, and the crystals of each part."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoint import CheckpointMeta
from ..data import CrystalDataset
from ..data.store import MANIFEST
from .config import ConfigError, RunConfig

# What a checkpoint fixes about the network that continues from it.
ENCODER_SIZES = ("channels", "num_scalars", "num_vectors", "num_blocks")


def start_torch(config: RunConfig) -> torch.device:
    """Set threads and seed; return the device to run on."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    return resolve_device(config.device)


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
    return {"model": network, "data": {"max_neighbors": meta.max_neighbors, "compat": meta.compat}}


def check_encoder_sizes(config: RunConfig, meta: CheckpointMeta) -> None:
    """Raise ConfigError if the configuration contradicts the checkpoint that the run continues from."""
    ours, theirs = dataclasses.asdict(config.model), dataclasses.asdict(meta.model)
    faults = [
        f"model.{name} = {ours[name]}, but the checkpoint has {theirs[name]}"
        for name in ENCODER_SIZES
        if ours[name] != theirs[name]
    ]
    if faults:
        raise ConfigError("; ".join(faults) + "; leave these keys out to take the checkpoint's")


def manifest_digest(dataset: CrystalDataset) -> str:
    """Return the SHA-256 of a dataset's manifest, which holds those of its shards."""
    return hashlib.sha256((dataset.path / MANIFEST).read_bytes()).hexdigest()


def describe_parts(sizes: Mapping[str, int]) -> str:
    """Say how many crystals each part has, as "train 5481, val 434"."""
    return ", ".join(f"{name or '(no part)'} {size}" for name, size in sizes.items())
