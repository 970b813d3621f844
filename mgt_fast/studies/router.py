"""What the router does: the share of each view in every prediction, and what that share goes with.

The share of a view is the size of its term in the final linear map (`model.MixtureOfExperts`); the SE(3) view
has what the SO(3) view has not, so one number a crystal tells both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from ..checkpoint import load_model
from ..data import CrystalDataset
from ..inference import predict_dataset, prediction_meta
from ..model import MGT
from ..train.batches import DataError
from ..train.config import RouterMonitorConfig
from ..train.evaluate import ALL, evaluate
from ..train.setup import resolve_device
from ..train.stagnation import router_state, share_figures
from .correlation import Correlation, GroupTest, kruskal_wallis, spearman
from .descriptors import CRYSTAL_SYSTEMS, Symmetry, describe, symmetries
from .output import Report, environment, write_report
from .router_report import draw, report_on
from .statistics import holm


@dataclass(frozen=True)
class Shares:
    """What one network's router does with n crystals.

    Attributes:
        name: of the network.
        target, unit: what it predicts; None if it does not say.
        indices: the crystals' positions in the dataset, (n,).
        so3: share of the SO(3) view in each prediction, (n,).
        prediction: (n,), in the target's units.
        reference: true values, (n,); None where the dataset has none.
        left_out: crystals without a prediction: id to reason.
    """

    name: str
    target: str | None
    unit: str | None
    indices: np.ndarray
    so3: np.ndarray
    prediction: np.ndarray
    reference: np.ndarray | None
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class Analysis:
    """What one network's shares go with.

    Attributes:
        shares: the network's.
        values: of descriptors by name, (n,) each.
        symmetry: of each crystal.
        figures: mean and spread of the shares; see `stagnation.share_figures`.
        state: where the router stagnates, or None; see `stagnation.router_state`.
        correlations: of each descriptor with the SO(3) view's share.
        groups: SO(3) view's shares by crystal system.
        systems: whether the groups differ.

    The p values are corrected together (`statistics.holm`).
    """

    shares: Shares
    values: Mapping[str, np.ndarray]
    symmetry: Sequence[Symmetry]
    figures: Mapping[str, float]
    state: str | None
    correlations: Mapping[str, Correlation]
    groups: Mapping[str, np.ndarray]
    systems: GroupTest


@dataclass(frozen=True)
class Agreement:
    """Whether two networks divide the same crystals alike: the correlation of their shares.

    Attributes:
        first, second: names of the networks.
        same_target: whether they predict the same.
        correlation: of the crystals that both predict; p value corrected for all pairs.
    """

    first: str
    second: str
    same_target: bool
    correlation: Correlation


def router_study(
    models: Sequence[str | Path],
    folder: str | Path,
    console: Console,
    dataset: str | Path | None = None,
    split: str = "test",
    *,
    split_file: Path | None = None,
    batch_size: int = 64,
    device: str = "auto",
) -> Report:
    """Examine the routers of networks on the crystals of a dataset, and write the report.

    Args:
        models: run folders or checkpoints, one a task; several of one task show whether they agree.
        folder: where the report goes.
        console: where tables go.
        dataset: prepared; None is the bundled one.
        split: "train", "val", "test" or "all".
        split_file: names the crystals of each part, instead of the dataset's own.
        batch_size: crystals at a time.
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError: if no model is given, one is given twice or has no router; as `train.evaluate.evaluate`.
    """
    on = resolve_device(device)
    paths = name_models(models)
    networks = {name: _routed(path, on) for name, path in paths.items()}
    crystals = CrystalDataset.open(dataset)
    found = [
        shares_of(name, network, crystals, split, batch_size, split_file)
        for name, network in networks.items()
    ]
    neighbors = max(prediction_meta(network).max_neighbors for network in networks.values())
    analyses = analyse(found, crystals, neighbors)
    report = report_on(
        analyses,
        agreements(found),
        crystals.ids,
        settings={"models": paths, "split": split, "split_file": split_file, "max_neighbors": neighbors},
        environment=environment(on, {"crystals": crystals}),
    )
    write_report(folder, report, lambda path: draw(path, analyses), console)
    return report


def name_models(models: Sequence[str | Path]) -> dict[str, Path]:
    """Name networks by run folder or file, with as many folders above as tell them apart.

    Raises:
        ValueError: if there is none, or one twice.
    """
    paths = [Path(path) for path in models]
    if not paths:
        raise ValueError("no model was given; name a run folder or checkpoint (--model)")
    parts = [path.resolve().with_suffix("").parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names):
            return dict(zip(names, paths, strict=True))
    twice = next(path for path, own in zip(paths, parts, strict=True) if parts.count(own) > 1)
    raise ValueError(f"model {twice} was given twice")


def shares_of(
    name: str,
    network: MGT,
    dataset: CrystalDataset,
    split: str,
    batch_size: int = 64,
    split_file: Path | None = None,
) -> Shares:
    """Predict a part of a dataset with one network.

    Raises:
        DataError: as `evaluate`; if the dataset lacks the network's target and a part is asked for, or
            nothing could be predicted.
    """
    meta = prediction_meta(network)
    if meta.target in dataset.target_info:
        evaluation = evaluate(network, dataset, split, batch_size=batch_size, split_file=split_file)
        table, reference, rejects = evaluation.table, evaluation.target, []
    elif split == ALL:
        reference = None
        table, rejects = predict_dataset(network, dataset, batch_size)
        if table is None:
            raise DataError(f"{name} could predict no crystal of {dataset.path}: {rejects[0].message}")
    else:
        raise DataError(
            f"{dataset.path} has no {meta.target or 'target'}, which {name} predicts, so the part {split!r} "
            f"holds no crystal with it; look at all crystals (--split {ALL})"
        )
    position = {crystal: i for i, crystal in enumerate(dataset.ids)}
    return Shares(
        name=name,
        target=meta.target,
        unit=meta.unit,
        indices=np.array([position[crystal] for crystal in table.ids]),
        so3=table.contributions[:, 1],
        prediction=table.prediction,
        reference=reference,
        left_out={reject.id: reject.message for reject in rejects},
    )


def analyse(found: Sequence[Shares], dataset: CrystalDataset, max_neighbors: int) -> list[Analysis]:
    """Correlate the shares of each network with what its crystals are; each crystal is described once."""
    indices = np.unique(np.concatenate([shares.indices for shares in found]))
    values, symmetry = describe(dataset, indices, max_neighbors), symmetries(dataset, indices)
    analyses = []
    for shares in found:
        rows = np.searchsorted(indices, shares.indices)
        own = {name: column[rows] for name, column in values.items()}
        analyses.append(_analysis(shares, own, [symmetry[row] for row in rows]))
    return analyses


def agreements(found: Sequence[Shares]) -> list[Agreement]:
    """Correlate the shares of each two networks on the crystals that both predict."""
    pairs = []
    for first, second in combinations(found, 2):
        _, at_first, at_second = np.intersect1d(first.indices, second.indices, return_indices=True)
        correlation = spearman(first.so3[at_first], second.so3[at_second])
        pairs.append(Agreement(first.name, second.name, first.target == second.target, correlation))
    adjusted = holm([pair.correlation.p_value for pair in pairs])
    return [
        replace(pair, correlation=replace(pair.correlation, p_value=p))
        for pair, p in zip(pairs, adjusted, strict=True)
    ]


def _routed(path: Path, device: torch.device) -> MGT:
    network = load_model(path, device=device)
    config = network.config
    if config.task != "predict" or config.views != "both" or config.fusion != "router":
        raise ValueError(
            f"{path}: this network has no router (task = {config.task}, views = {config.views}, fusion = "
            f"{config.fusion}); fine-tune one with model.views=both and model.fusion=router"
        )
    return network


def _analysis(shares: Shares, values: Mapping[str, np.ndarray], symmetry: Sequence[Symmetry]) -> Analysis:
    monitor = RouterMonitorConfig()
    figures = share_figures(np.stack((1 - shares.so3, shares.so3), axis=1), monitor)
    columns = dict(values)
    if shares.reference is not None:
        columns["reference"] = shares.reference
        columns["absolute_error"] = np.abs(shares.prediction - shares.reference)
    systems = np.array([crystal.system or "" for crystal in symmetry])
    groups = {name: shares.so3[systems == name] for name in CRYSTAL_SYSTEMS if (systems == name).any()}
    correlations = {name: spearman(column, shares.so3) for name, column in columns.items()}
    test = kruskal_wallis(list(groups.values()))
    *adjusted, of_systems = holm([*(one.p_value for one in correlations.values()), test.p_value])
    return Analysis(
        shares=shares,
        values=columns,
        symmetry=symmetry,
        figures=figures,
        state=router_state(figures, monitor),
        correlations={
            name: replace(one, p_value=p)
            for (name, one), p in zip(correlations.items(), adjusted, strict=True)
        },
        groups=groups,
        systems=replace(test, p_value=of_systems),
    )
