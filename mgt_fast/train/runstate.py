"""The state of a run at a step, from which it continues bit for bit: tensors and a JSON record.

    <run folder>/checkpoints/
        step-000001200/tensors.safetensors   weights, optimiser, ...
        step-000001200/state.json            the record, and the size and SHA-256 of the tensors and of itself
        step-000001600/...
        latest                               name of the state to continue from

A state is written into a hidden folder, synced, renamed, and named by `latest` last of all; so `latest` names
a whole state whenever the process or its machine stops. What a killed process left is removed by the next
`save`. Nothing is ever pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..checkpoint import CheckpointError
from ..durable import (
    TEMPORARY,
    explained,
    make_folder,
    move_into_place,
    remove_leftovers,
    sync_folder,
    write_synced,
)

CHECKPOINTS, LATEST = "checkpoints", "latest"
TENSORS, STATE = "tensors.safetensors", "state.json"
FORMAT, FORMAT_VERSION = "mgt-fast run state", 1
OPTIMIZER = "optimizer."  # prefix of the tensors of `pack_optimizer`
_NAME = re.compile(r"step-(\d{9,18})(\.1)?")
_LONGEST_NAME = 64
_LARGEST_STATE = 2**24  # bytes of state.json

Tensors = dict[str, torch.Tensor]


class StateStore:
    """The states of one run; the writer must hold the folder's lock.

    Args:
        folder: the run folder.
        keep: states to keep, the newest ones. While one is written there is one more.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep = {keep}; at least one state must stay")
        self.folder = Path(folder) / CHECKPOINTS
        self.keep = keep

    def exists(self) -> bool:
        """Whether there is a state to continue from, whole or not."""
        return (self.folder / LATEST).exists() or bool(self.steps())

    def steps(self) -> list[int]:
        """Return the steps of which there are states, in rising order."""
        return sorted({step_of(name) for name in self._names()})

    def save(
        self,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        record: Mapping[str, Any],
        attached: Sequence[Path] = (),
    ) -> Path:
        """Write a state, make it the latest and remove those that are not kept.

        States of later steps are removed as well: they belong to a course of the run that it left when it
        went on from an earlier state.

        Args:
            step: optimiser steps taken so far.
            tensors: by name, of any device; no two may share memory.
            record: what else is needed, in JSON's types; floats come back exactly.
            attached: files to keep as they are now, where they exist; they are never changed in place, only
                replaced, so a hard link keeps them.

        Returns:
            The state's folder.

        Raises:
            OSError: if the disk is full or fails; the message names the folder, the bytes needed and free,
                and the state that is the latest now, the earlier one unless the new one was complete.
        """
        data = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
        text = _state_text(step, data, record)
        name = self._free_name(step)
        final = self.folder / name
        with explained(f"run state {final}", self.folder, len(data) + len(text), self._situation):
            self._write(name, data, text, attached)
            older = [other for other in self._newest_first() if step_of(other) < step]
            kept = {name, *older[: self.keep - 1]}
            self._remove([other for other in self._names() if other not in kept])
        return final

    def load(self, step: int | None = None) -> tuple[Tensors, dict[str, Any]]:
        """Read a state, whole or not at all.

        Args:
            step: whose state; None takes the latest.

        Returns:
            The tensors, on the CPU, and the record.

        Raises:
            CheckpointError: if there is none, or it is damaged; the message names the file, what differs and
                the states that are whole. No other state is taken instead.
        """
        name = self._name_of(step)
        try:
            return self._read(name)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {self._whole_others(name)}") from None

    def attached(self, name: str, step: int | None = None) -> bytes | None:
        """Return a file that was attached to a state, or None; see `load` for the step."""
        file = self.folder / self._name_of(step) / name
        return file.read_bytes() if file.is_file() else None

    def clear(self) -> None:
        """Remove all states, and the folder if nothing else is in it."""
        if not self.folder.is_dir():
            return
        (self.folder / LATEST).unlink(missing_ok=True)
        self._make_folder()
        self._remove(self._names())
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _name_of(self, step: int | None) -> str:
        """Return the name of a step's state, or of the latest."""
        if step is None:
            # Before the first state is pointed to, there may be one that a killed process completed.
            name = self._pointed() or next(iter(self._newest_first()), None)
            if name is None:
                raise CheckpointError(f"{self.folder} holds no state to continue from")
            return name
        names = [name for name in self._newest_first() if step_of(name) == step]
        pointed = self._trusted()
        return pointed if pointed in names else next(iter(names), f"step-{step:09d}")

    def _free_name(self, step: int) -> str:
        """Return a name for a new state; another state of this step stays until the new one is pointed to."""
        names = [f"step-{step:09d}", f"step-{step:09d}.1"]
        free = [name for name in names if not (self.folder / name).exists()]
        return next(iter(free), names[names[0] == self._trusted()])

    def _write(self, name: str, data: bytes, text: bytes, attached: Sequence[Path]) -> None:
        """Write a state and point to it, or leave no trace of it."""
        temporary, final = self.folder / f".{name}{TEMPORARY}", self.folder / name
        self._make_folder()
        self._remove([name] if final.exists() else [])
        try:
            temporary.mkdir()
            write_synced(temporary / TENSORS, data)
            write_synced(temporary / STATE, text)
            for path in attached:
                if path.exists():
                    _link(path, temporary / path.name)
            sync_folder(temporary)
            os.rename(temporary, final)
            sync_folder(self.folder)
            move_into_place(self.folder / LATEST, f"{name}\n".encode())
        except BaseException:
            if self._trusted() != name:
                for folder in (temporary, final):
                    shutil.rmtree(folder, ignore_errors=True)
            raise

    def _names(self) -> list[str]:
        """Names of all states, whole or not."""
        if not self.folder.is_dir():
            return []
        return [path.name for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]

    def _newest_first(self) -> list[str]:
        return sorted(self._names(), key=lambda name: (-step_of(name), name))

    def _pointed(self) -> str | None:
        """Name that `latest` holds; None if there is no such file."""
        file = self.folder / LATEST
        try:
            with file.open("rb") as stream:
                name = stream.read(_LONGEST_NAME).decode(errors="replace").removesuffix("\n")
        except FileNotFoundError:
            return None
        if not _NAME.fullmatch(name):
            fault = f"{file} is damaged: it holds {name!r}, which is no state's name"
            raise CheckpointError(f"{fault}; {self._whole_others(None)}")
        return name

    def _trusted(self) -> str | None:
        """Name that `latest` holds; None as well if it is damaged, which a new state mends."""
        try:
            return self._pointed()
        except CheckpointError:
            return None

    def _make_folder(self) -> None:
        """Make the folder, or remove what killed processes left in it."""
        make_folder(self.folder)
        for leftover in self.folder.glob(f".step-*{TEMPORARY}"):
            shutil.rmtree(leftover)
        remove_leftovers(self.folder / LATEST)

    def _remove(self, names: list[str]) -> None:
        """Remove states; one that is half removed has no state's name any more."""
        for name in names:
            doomed = self.folder / f".{name}{TEMPORARY}"
            os.rename(self.folder / name, doomed)
            shutil.rmtree(doomed)

    def _read(self, name: str) -> tuple[Tensors, dict[str, Any]]:
        """Read and verify the state of this name."""
        folder = self.folder / name
        if not folder.is_dir():
            raise CheckpointError(f"run state {folder} is missing")
        state = _read_state(folder / STATE)
        if state.get("step") != step_of(name):
            _damaged(folder / STATE, f"it is the state of step {state.get('step')!r:.32}")
        data = _read_file(folder / TENSORS, state["tensors"]["bytes"])
        _compare(folder / TENSORS, data, state["tensors"]["sha256"])
        try:
            return load(data), state["record"]
        except (SafetensorError, ValueError, KeyError) as error:
            _damaged(folder / TENSORS, f"it is no safetensors file ({error})")

    def _is_whole(self, name: str) -> bool:
        try:
            self._read(name)
        except (CheckpointError, OSError):
            return False
        return True

    def _whole_others(self, name: str | None) -> str:
        """Say from which states but `name` the run can continue."""
        whole = [other for other in self._newest_first() if other != name and self._is_whole(other)]
        if not whole:
            return "no other state is whole; start the run anew (--overwrite)"
        return f"whole: {', '.join(whole)}; continue from there with --resume-from {whole[0]}"

    def _situation(self) -> str:
        """Say what there is to continue from after a failed save."""
        try:
            pointed = self._pointed()
        except (CheckpointError, OSError) as error:
            return str(error)
        if pointed is None:
            return "there was no earlier state"
        return f"{pointed} is whole: make room and continue from it with --resume"


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        write_synced(target, source.read_bytes())


def step_of(name: str) -> int:
    """Return the step of a state from its folder's name.

    Raises:
        ValueError: if it is no state's name.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is no name of a run state, such as step-000001200")
    return int(match[1])


def pack_optimizer(optimizer: torch.optim.Optimizer) -> Tensors:
    """Return an optimiser's moments, step counts and learning rates as tensors.

    The names begin with "optimizer."; parameters count through all groups. The other settings of the groups
    are the configuration's.
    """
    packed = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            if not torch.is_tensor(value):
                raise ValueError(f"the optimiser keeps {key}, a {type(value).__name__}, which is no tensor")
            packed[f"{OPTIMIZER}{index}.{key}"] = value.detach().clone()
    for index, group in enumerate(optimizer.param_groups):
        packed[f"{OPTIMIZER}lr.{index}"] = torch.tensor(float(group["lr"]), dtype=torch.float64)
    return packed


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put an optimiser back into the state that `pack_optimizer` returned, bit for bit.

    Tensors that the optimiser has already are filled in place, so that captured CUDA graphs stay valid.

    Args:
        optimizer: with the same parameters in the same groups.
        tensors: of `pack_optimizer`; names without its prefix are passed over.

    Raises:
        CheckpointError: if they do not fit the optimiser, which is as it was then.
    """
    given = {name.removeprefix(OPTIMIZER): v for name, v in tensors.items() if name.startswith(OPTIMIZER)}
    rates = [given.pop(f"lr.{index}", None) for index in range(len(optimizer.param_groups))]
    parameters = _parameters(optimizer)
    moments: list[Tensors] = [{} for _ in parameters]
    faults = [f"{OPTIMIZER}lr.{index} is missing" for index, rate in enumerate(rates) if rate is None]
    for name, value in given.items():
        index, _, key = name.partition(".")
        if not (index.isdecimal() and int(index) < len(parameters) and key):
            faults.append(f"{OPTIMIZER}{name} is none of its {len(parameters)} parameters'")
        elif value.dim() and value.shape != parameters[int(index)].shape:
            shape = tuple(parameters[int(index)].shape)
            faults.append(f"{OPTIMIZER}{name} has shape {tuple(value.shape)}, its parameter {shape}")
        else:
            moments[int(index)][key] = value
    if faults:
        raise CheckpointError("the state does not fit the optimiser: " + "; ".join(faults[:5]))
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if torch.is_tensor(group["lr"]):
            group["lr"].copy_(rate)
        else:
            group["lr"] = rate.item()
        on_device = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            _fill(optimizer.state[parameter], moments.pop(0), parameter.device, on_device)


def _fill(state: dict[str, Any], values: Tensors, device: torch.device, on_device: bool) -> None:
    for key in state.keys() - values.keys():
        del state[key]
    for key, value in values.items():
        held = state.get(key)
        if torch.is_tensor(held) and (held.shape, held.dtype) == (value.shape, value.dtype):
            held.copy_(value)
        else:
            # The fused and the capturable update count steps where the parameter is, the others on the CPU.
            place = device if on_device or key != "step" else torch.device("cpu")
            state[key] = value.to(place, copy=True)


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _state_text(step: int, tensors: bytes, record: Mapping[str, Any]) -> bytes:
    """Return the contents of state.json."""
    content = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "step": step,
        "tensors": {"bytes": len(tensors), "sha256": hashlib.sha256(tensors).hexdigest()},
        "record": dict(record),
    }
    return json.dumps({**content, "sha256": _digest(content)}, indent=1).encode()


def _digest(content: dict[str, Any]) -> str:
    """SHA-256 of all of state.json but this digest."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_state(file: Path) -> dict[str, Any]:
    """Read and verify a state.json."""
    data = _read_file(file, largest=_LARGEST_STATE)
    try:
        state = json.loads(data)
        expected = state.pop("sha256")
        found = _digest(state)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        _damaged(file, f"it cannot be read ({type(error).__name__}: {error})")
    if found != expected:
        _damaged(file, f"its SHA-256 is {found}, {str(expected)[:64]} was recorded")
    if (state.get("format"), state.get("version")) != (FORMAT, FORMAT_VERSION):
        raise CheckpointError(f"{file} is no {FORMAT} of version {FORMAT_VERSION}, which this program reads")
    tensors, record = state.get("tensors"), state.get("record")
    if not (isinstance(record, dict) and isinstance(tensors, dict) and tensors.keys() == {"bytes", "sha256"}):
        _damaged(file, "it lacks the record, or the tensors' size and SHA-256")
    return state


def _read_file(file: Path, size: int | None = None, largest: int | None = None) -> bytes:
    """Read a file of this size, or of at most this size."""
    if not file.is_file():
        _damaged(file, "it is no regular file" if file.exists() else "it is missing")
    found = file.stat().st_size
    if size is not None and found != size:
        _damaged(file, f"it has {found} bytes, {size} were recorded")
    if largest is not None and found > largest:
        _damaged(file, f"it has {found} bytes, no more than {largest} are written")
    return file.read_bytes()


def _compare(file: Path, data: bytes, expected: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        _damaged(file, f"its SHA-256 is {found}, {str(expected)[:64]} was recorded")


def _damaged(file: Path, difference: str) -> NoReturn:
    raise CheckpointError(f"{file} is damaged: {difference}")
