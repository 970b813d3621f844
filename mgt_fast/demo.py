"""The demo: pretrain, fine-tune and predict on the bundled crystals, with pictures; minutes on two cores."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from .checkpoint import load_checkpoint
from .data import CrystalDataset
from .inference import predict_paths
from .model import MGT
from .plots import plot_curves, plot_parity, plot_router
from .predictions import read_predictions
from .structures import CrystalBatch
from .train.config import FinetuneConfig, PretrainConfig, load_config
from .train.finetune import finetune
from .train.pretrain import pretrain
from .train.runlog import PREDICTIONS, read_metrics, say
from .train.setup import values_from_checkpoint


def run_demo(folder: str | Path, console: Console, overrides: Sequence[str] = ()) -> dict:
    """Run the demo and leave runs, a CIF with its prediction, and three pictures in `folder`.

    Args:
        folder: is made if needed; what an earlier demo left there is replaced.
        console: where progress goes.
        overrides: "a.b=c" settings over both demo configurations.

    Returns:
        The errors on val and test, as `finetune` does.
    """
    folder = Path(folder)
    start = time.perf_counter()
    say(console, "1. Pretraining: contrast between the two views, and denoising, without labels")
    pretraining = load_config(PretrainConfig, "demo_pretrain", overrides)
    pretrain(pretraining, folder / "pretrain", console, overwrite=True)

    say(console, "2. Fine-tuning on the training part; val and test crystals come from the official split")
    meta = load_checkpoint(folder / "pretrain")[1]
    settings = load_config(FinetuneConfig, "demo_finetune", overrides, values_from_checkpoint(meta))
    results = finetune(settings, folder / "finetune", console, folder / "pretrain", overwrite=True)

    say(console, "3. Predicting a CIF file")
    model = MGT.load(folder / "finetune")
    dataset = CrystalDataset.open(settings.data.path)
    index = typical_crystal(dataset, settings.data.target)
    cif = folder / f"{dataset.ids[index]}.cif"
    write_cif(cif, dataset.gather([index]))
    table, _ = predict_paths(model, [cif], workers=0)
    table.write(folder / "prediction.csv")
    share = (
        "" if table.contributions is None else f", {table.contributions[0, 1]:.0%} of it from the SO(3) view"
    )
    say(
        console,
        f"{cif}: {table.label} {table.prediction[0]:.3f} predicted{share}; "
        f"reference {dataset.targets[settings.data.target][index]:.3f}",
    )

    pictures = draw(folder, pretraining, table.target, table.unit)
    say(console, f"4. Pictures: {', '.join(str(path) for path in pictures)}")
    say(console, f"done in {time.perf_counter() - start:.0f} s")
    return results


def draw(folder: Path, pretraining: PretrainConfig, target: str, unit: str | None) -> list[Path]:
    """Draw the demo's pictures from its run folders; return their paths."""
    names = ("pretraining.png", "loss_curves.png", "parity.png", "router.png")
    paths = [folder / name for name in names]
    panels = {
        "contrastive loss": ("train_contrastive", "val_contrastive"),
        "SE(3) denoising loss": ("train_se3_denoising", "val_se3_denoising"),
        "SO(3) denoising loss": ("train_so3_denoising", "val_so3_denoising"),
    }
    references = {"contrastive loss": (math.log(2 * pretraining.optim.batch_size - 1), "chance")}
    if pretraining.model.denoising == "edge":  # three components of unit variance
        references |= {name: (3.0, "no denoising") for name in panels if "denoising" in name}
    records = read_metrics(folder / "pretrain")
    panels = {
        name: metrics for name, metrics in panels.items() if metrics[0] in records[0]
    }  # one view: fewer
    plot_curves(paths[0], records, panels, references)
    unit_suffix = f" ({unit})" if unit else ""
    plot_curves(
        paths[1],
        read_metrics(folder / "finetune"),
        {"training loss": ("train_loss",), f"mean absolute error{unit_suffix}": ("train_mae", "val_mae")},
    )
    scored = read_predictions(folder / "finetune" / PREDICTIONS)
    parts = {part: scored.part == part for part in ("val", "test") if (scored.part == part).any()}
    plot_parity(
        paths[2],
        {part: (scored.reference[chosen], scored.prediction[chosen]) for part, chosen in parts.items()},
        target,
        unit,
    )
    if scored.contributions is None:  # a network without a router
        return paths[:3]
    plot_router(paths[3], scored.contributions[:, 1], scored.reference, target, unit)
    return paths


def typical_crystal(dataset: CrystalDataset, target: str) -> int:
    """Return the test crystal whose target is nearest to the median of the test part."""
    values = np.where(dataset.split == "test", dataset.targets[target], np.nan)
    return int(np.nanargmin(np.abs(values - np.nanmedian(values))))


def write_cif(path: Path, crystals: CrystalBatch) -> None:
    """Write the first crystal of a batch as a CIF file, without looking for its symmetry."""
    from pymatgen.core import Lattice, Structure

    last = int(crystals.batch_ptr[1])
    structure = Structure(
        Lattice(crystals.cell[0].numpy()),
        [int(number) for number in crystals.numbers[:last]],
        crystals.frac_coords[:last].numpy(),
    )
    structure.to(filename=str(path), fmt="cif")
