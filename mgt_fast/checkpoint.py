"""Checkpoints: one safetensors file with weights, configuration, target scaling and a digest.

The file's metadata holds one JSON text under "mgt_fast"; every safetensors reader can open it. It is
written under another name and then moved into place, so a file under its own name is always whole. Nothing
in it is run, and it takes no more memory than its size.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .config import MGTConfig
from .durable import replace_file
from .graph import SHELL_TOLERANCE
from .model import MGT
from .target_scaling import TRANSFORMS, TargetScaling

BEST, LAST = "best.safetensors", "last.safetensors"
_KEY = "mgt_fast"
# Parts of the network that are never initialised anew beside loaded ones.
_TRUNK_SUFFIXES = ("_graph_encoder", "_projection_encoder")


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, or does not fit the network."""


@dataclass(frozen=True, kw_only=True)
class CheckpointMeta:
    """What is needed beside the weights to predict, and where the weights come from.

    Attributes:
        model: the network's configuration.
        max_neighbors, compat, shell_tolerance: how the graphs are built (see `graph.build_graph`).
        target, unit: what is predicted, and its unit; None for a pretrained network.
        target_mean, target_std, target_transform: see `scaling`.
        dataset: digest of the training dataset's manifest.
        fractions, seed: how its parts were drawn at random; None for the dataset's own parts.
        split: digest of the file that named its parts; None where no file did.
        epoch: passes over the training data.
        metrics: of that epoch on the held-out part.
        version: of mgt-fast that wrote the file.
    """

    model: MGTConfig
    max_neighbors: int = 25
    compat: str | None = None
    shell_tolerance: float = SHELL_TOLERANCE
    target: str | None = None
    unit: str | None = None
    target_mean: float = 0.0
    target_std: float = 1.0
    target_transform: str = "none"
    dataset: str | None = None
    fractions: tuple[float, float, float] | None = None
    seed: int | None = None
    split: str | None = None
    epoch: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    version: str = field(default_factory=lambda: version("mgt-fast"))

    def __post_init__(self):
        if not (isinstance(self.max_neighbors, int) and self.max_neighbors >= 1):
            raise ValueError(f"max_neighbors = {self.max_neighbors!r}; it must be a whole number from 1")
        if self.compat not in (None, "comformer"):
            raise ValueError(f"compat = {self.compat!r}; choose 'comformer' or None")
        if not 0 <= self.shell_tolerance < 1:
            raise ValueError(f"shell_tolerance = {self.shell_tolerance!r}; it must lie in [0, 1)")
        if not (math.isfinite(self.target_mean) and math.isfinite(self.target_std) and self.target_std > 0):
            raise ValueError(
                f"target_mean = {self.target_mean}, target_std = {self.target_std}; both must be finite and "
                "the deviation greater than 0"
            )
        if self.target_transform not in TRANSFORMS:
            raise ValueError(
                f"target_transform = {self.target_transform!r}; choose one of {', '.join(TRANSFORMS)}"
            )

    @property
    def scaling(self) -> TargetScaling:
        """The map between the network's output and the target's units."""
        return TargetScaling(self.target_mean, self.target_std, self.target_transform)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CheckpointMeta:
        """Build from `dataclasses.asdict`'s form; unknown keys raise TypeError."""
        fractions = values.get("fractions")
        converted = {
            "model": MGTConfig(**values["model"]),
            "fractions": None if fractions is None else tuple(fractions),
        }
        return cls(**{**values, **converted})


def save_checkpoint(path: str | Path, model: torch.nn.Module, meta: CheckpointMeta) -> None:
    """Write a model's parameters and buffers with `meta` to `path`, replacing it in one step.

    Raises:
        OSError: if the disk is full or fails; an earlier file at `path` is whole then.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    record = {"meta": asdict(meta)}
    record["sha256"] = _digest(state, record["meta"])
    replace_file(Path(path), save(state, metadata={"format": "pt", _KEY: json.dumps(record)}))


def load_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], CheckpointMeta]:
    """Read a checkpoint's weights (on the CPU) and metadata.

    Args:
        path: a .safetensors file, or a run folder, whose best checkpoint is taken.

    Raises:
        CheckpointError: if there is none, it was not written by mgt-fast, it is damaged, or weights and
            configuration do not fit each other.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / BEST).is_file():
            raise CheckpointError(f"folder {path} holds no {BEST}; is it a run folder of mgt-fast?")
        path = path / BEST
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        hint = (
            "; use `mgt-fast import-checkpoint` for a published .pt" if path.suffix in (".pt", ".pth") else ""
        )
        raise CheckpointError(f"{path} is no readable safetensors file ({error}){hint}") from None
    if _KEY not in metadata:
        raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of mgt-fast")
    try:
        record = json.loads(metadata[_KEY])
        meta, expected = CheckpointMeta.from_dict(record["meta"]), record["sha256"]
        found = _digest(state, record["meta"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its metadata cannot be read by this version ({error})") from None
    if found != expected:
        raise CheckpointError(
            f"{path} is damaged: its contents have SHA-256 {found[:16]}…, but {str(expected)[:16]}… was "
            "recorded; copy it again from its source"
        )
    if misfit := _misfit(state, meta.model):
        raise CheckpointError(f"{path}: weights and configuration do not fit each other: {misfit}")
    return state, meta


def load_model(path: str | Path, backend: str = "auto", device: str | torch.device = "cpu") -> MGT:
    """Build the network of a checkpoint, in eval mode, with its metadata as attribute `meta`.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    state, meta = load_checkpoint(path)
    model = MGT(meta.model, backend=backend)
    model.load_state_dict(state)
    model.meta = meta
    return model.to(device).eval()


def transfer_weights(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> tuple[list[str], list[str]]:
    """Load pretrained weights into a network with other heads.

    Modules that both have must agree in every name and shape. Heads that the checkpoint lacks keep their
    initial weights; an encoder or projection that it lacks is an error.

    Args:
        model: the network, changed in place.
        state: a checkpoint's weights.

    Returns:
        Names of the modules left as initialised, and of the checkpoint's modules that were not used.

    Raises:
        CheckpointError: naming the weights that are missing, unknown or of another shape.
    """
    own = model.state_dict()
    own_modules, given_modules = _modules(own), _modules(state)
    fresh, unused = own_modules - given_modules, given_modules - own_modules
    wanted = {name for name in own if name.partition(".")[0] not in fresh}
    given = {name for name in state if name.partition(".")[0] not in unused}
    faults = [f"{name} is missing from the checkpoint" for name in sorted(wanted - given)]
    faults += [f"{name} is not in the network" for name in sorted(given - wanted)]
    faults += [f"the checkpoint lacks {name}" for name in sorted(fresh) if name.endswith(_TRUNK_SUFFIXES)]
    faults += [
        f"{name} has shape {tuple(state[name].shape)}, {tuple(own[name].shape)} in the network"
        for name in sorted(wanted & given)
        if state[name].shape != own[name].shape
    ]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError("the checkpoint does not fit the network: " + "; ".join(faults[:5]) + more)
    model.load_state_dict({**own, **{name: state[name] for name in wanted}})
    return sorted(fresh), sorted(unused)


def _misfit(state: dict[str, torch.Tensor], config: MGTConfig) -> str:
    """Say in which weights a network of this configuration differs from a checkpoint's; "" if in none.

    The network has no memory, whatever sizes the file asks for.
    """
    if not config.num_blocks <= len(state):  # each block has weights of its own
        return f"num_blocks = {config.num_blocks}, but there are {len(state)} weights"
    try:
        with torch.device("meta"):
            expected = MGT(config).state_dict()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        return f"there is no network of {config} ({error})"
    faults = [f"{name} is missing" for name in sorted(expected.keys() - state.keys())]
    faults += [f"{name} is not in the network" for name in sorted(state.keys() - expected.keys())]
    faults += [
        f"{name} is {_kind(state[name])}, {_kind(value)} in the network"
        for name, value in expected.items()
        if name in state and _kind(state[name]) != _kind(value)
    ]
    more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
    return "; ".join(faults[:5]) + more


def _kind(value: torch.Tensor) -> str:
    """Describe a tensor's shape and whether it holds real, whole or complex numbers."""
    numbers = "complex" if value.is_complex() else "real" if value.is_floating_point() else "whole"
    return f"{tuple(value.shape)} of {numbers} numbers"


def _modules(state: dict[str, torch.Tensor]) -> set[str]:
    """Names of the network's direct children that hold weights."""
    return {name.partition(".")[0] for name in state}


def _digest(state: dict[str, torch.Tensor], meta: dict[str, Any]) -> str:
    """SHA-256 over the metadata and over names, types, shapes and bytes of all weights."""
    sha = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(state):
        value = state[name]
        sha.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        sha.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()
