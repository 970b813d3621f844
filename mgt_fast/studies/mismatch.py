"""Whether a pretraining fits the structures that it is fine-tuned on."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console

from ..checkpoint import load_model
from ..distributed import Ranks
from ..durable import make_folder, replace_file
from ..train.batches import require_part, select_parts
from ..train.config import FinetuneConfig, PretrainConfig
from ..train.plan import batch_bounds
from ..train.pretrain import pretraining_task
from ..train.setup import open_dataset, start_torch
from .statistics import PairedTest, holm, over_seeds
from .trials import TrialResult

WORSE = 1.25
"""A pretraining loss so many times that of the source counts as high."""

LITTLE = 0.95
"""A pretraining loss above this share of what chance gives counts as not learnt."""

LOSSES = ("contrastive", "se3_denoising", "so3_denoising")


@dataclass(frozen=True)
class PretrainingLosses:
    """Pretraining losses of one checkpoint on as many crystals of the source as of the target set.

    Attributes:
        name: of the pretraining.
        crystals: of each set.
        source, target: losses by name; the source's crystals were held out.
        chance: losses of a network that has learnt nothing, as far as they are known.
    """

    name: str
    crystals: int
    source: dict[str, float]
    target: dict[str, float]
    chance: dict[str, float]


@dataclass(frozen=True)
class Speed:
    """How far fine-tuning has come after some epochs: val MAE of pretrained runs minus that from scratch.

    Attributes:
        size: training crystals.
        epoch: at which.
        pretrained, scratch: mean val MAE.
        test: of the differences over seeds.
    """

    size: int
    epoch: int
    pretrained: float
    scratch: float
    test: PairedTest


def pretraining_losses(
    name: str,
    checkpoint: Path,
    config: PretrainConfig,
    finetuning: FinetuneConfig,
    target_ids: Sequence[str],
    folder: Path,
) -> PretrainingLosses:
    """Evaluate a checkpoint's pretraining losses on the source's held-out crystals and on the target set's.

    Both sets have as many crystals, in batches of the same size, on which the contrastive loss depends.

    Args:
        name: of the pretraining.
        checkpoint: file or run folder.
        config: of the pretraining.
        finetuning: names the target set.
        target_ids: structures of the target set, two at least; their labels are not looked at.
        folder: where the lists of crystals are written.
    """
    device, ranks = start_torch(config), Ranks.alone()
    sets = {
        "source": (open_dataset(config.data.path, ranks), _held_out_ids(config), config.data.path),
        "target": (open_dataset(finetuning.data.path, ranks), target_ids, finetuning.data.path),
    }
    # A pretraining has two crystals to learn from, even if it is only evaluated.
    number = min(min(len(ids), len(dataset) - 2) for dataset, ids, _ in sets.values())
    rng = np.random.default_rng(config.seed)
    found = {}
    for what, (dataset, ids, path) in sets.items():
        chosen = sorted(rng.permutation(np.array(ids, dtype=object))[:number].tolist())
        taken = set(chosen)
        others = list(islice((other for other in dataset.ids if other not in taken), 2))
        file = folder / f"{name}-{what}.json"
        write_split(file, {"train": others, "val": chosen})
        data = {"path": path, "split_file": file, "fractions": None, "limit": None, "train": ("train",)}
        data |= {"held_out": "val"}
        here = config.model_copy(update={"data": config.data.model_copy(update=data)})
        task, _ = pretraining_task(here, device, ranks, Console(quiet=True))
        task.model = load_model(checkpoint, config.backend, device)
        losses = {key.removeprefix("val_"): value for key, value in task.validate().items()}
        found[what] = {key: losses[key] for key in LOSSES if key in losses}
    batches = np.diff(batch_bounds(number, config.optim.batch_size))
    chance = {"contrastive": float(np.average(np.log(2 * batches - 1), weights=batches))}
    if config.model.denoising == "edge":  # three components of unit variance
        chance |= dict.fromkeys(("se3_denoising", "so3_denoising"), 3.0)
    known = {key: value for key, value in chance.items() if key in found["source"]}
    return PretrainingLosses(name, number, **found, chance=known)


def speeds(pairs: Sequence[tuple[int, Sequence[TrialResult], Sequence[TrialResult]]]) -> list[Speed]:
    """Compare fine-tuning after a tenth of its epochs and at its end, for each size; Holm over all of them.

    Args:
        pairs: number of training crystals, pretrained trials and those from scratch, in the order of seeds.
    """
    rows = []
    for size, pretrained, scratch in pairs:
        last = min(len(one.metrics) for one in (*pretrained, *scratch))
        for epoch in sorted({max(1, round(0.1 * last)), last}):
            ours, theirs = (
                np.array([one.metrics[epoch - 1]["val_mae"] for one in arm]) for arm in (pretrained, scratch)
            )
            test = over_seeds(ours - theirs)
            rows.append(Speed(size, epoch, float(ours.mean()), float(theirs.mean()), test))
    corrected = holm([row.test.p_value for row in rows])
    return [replace(row, test=replace(row.test, p_value=p)) for row, p in zip(rows, corrected, strict=True)]


def mismatch_warnings(
    losses: Sequence[PretrainingLosses], found: Sequence[Speed], unit: str | None
) -> list[str]:
    """Return what speaks against the pretraining, each with its figures and a remedy."""
    warnings = []
    suffix = f" {unit}" if unit else ""
    for name in LOSSES:
        pairs = [(one.source[name], one.target[name]) for one in losses if name in one.source]
        if not pairs:
            continue
        source, target = np.mean(pairs, axis=0)
        if all(one.source[name] > LITTLE * one.chance.get(name, math.inf) for one in losses):
            warnings.append(
                f"the pretraining has learnt little: its {name.replace('_', ' ')} loss on held-out crystals "
                f"of the source is {source:.3g}, where {losses[0].chance[name]:.3g} is chance "
                f"({len(pairs)} pretrainings): pretrain for more epochs or with a higher learning rate"
            )
        if all(theirs > WORSE * ours for ours, theirs in pairs):
            warnings.append(
                f"pretraining mismatch: the {name.replace('_', ' ')} loss is {source:.3g} on held-out "
                f"crystals of the source and {target:.3g} on the target set's ({target / source:.2f} times; "
                f"{len(pairs)} pretrainings, {losses[0].crystals} crystals): these structures are unlike "
                "those learnt from; add structures like them to the source, without labels"
            )
    learnt = ", ".join(
        f"{name.replace('_', ' ')} {np.mean([one.source[name] for one in losses]):.3g}"
        for name in (losses[0].source if losses else ())
    )
    for row in found:
        if row.test.resolved and row.test.difference > 0:
            warnings.append(
                f"with {row.size} crystals fine-tuning is behind training from scratch in epoch {row.epoch}: "
                f"val MAE {row.pretrained:.3g} against {row.scratch:.3g}{suffix} (n = {row.test.count} "
                f"seeds, p = {row.test.p_value:.2g}; pretraining losses on its own crystals: "
                f"{learnt or 'not known'}): pretrain for fewer epochs, raise optim.lr of fine-tuning, or "
                "start from scratch"
            )
    return warnings


def write_split(file: Path, parts: dict[str, Sequence[str]]) -> None:
    """Write a file for `data.split_file`; one that says the same stays as it is."""
    data = (json.dumps({name: list(ids) for name, ids in parts.items()}) + "\n").encode()
    if not file.is_file() or file.read_bytes() != data:
        make_folder(file.parent)
        replace_file(file, data)


def _held_out_ids(config: PretrainConfig) -> list[str]:
    dataset = open_dataset(config.data.path, Ranks.alone())
    parts = select_parts(dataset, config.data, config.seed)
    return [dataset.ids[i] for i in require_part(parts, config.data.held_out, "hold out")]
