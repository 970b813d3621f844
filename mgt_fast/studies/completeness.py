"""Which views tell distinct crystals apart: a probe with pairs that distances or one view confuse.

A view separates a pair if the embeddings of the two crystals differ by far more than those of two
descriptions of one crystal do (other cell, origin, order of atoms, orientation), which is by rounding.

The probe takes networks of random weights, in float64. A network is an analytic function of its weights: a
difference that is zero at random weights is zero at all of them, so what is confused here (to rounding) no
training separates. How far apart the others are put says how hard they are to see, for a start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pymatgen.core import Lattice, Structure
from rich.console import Console
from scipy.spatial.transform import Rotation

from ..checkpoint import load_model
from ..config import MGTConfig
from ..graph import build_graph
from ..inference import prediction_meta
from ..model import MGT
from ..outputs import MGTOutput
from ..structures import CrystalBatch
from .completeness_report import draw, report_on
from .output import Report, environment, write_report
from .pairs import PAIRS, Pair
from .refinement import pair_distances_separate, refinement_separates
from .router import name_models

NETWORK = MGTConfig(channels=64, num_scalars=32, num_vectors=4, dropout=0.0)
"""The networks of random weights; two blocks, as published."""

DESCRIPTIONS = 4  # of each crystal beside the first, to learn what rounding does
MARGIN = 100  # times the rounding must be exceeded
FAINT = torch.finfo(torch.float32).eps
"""Relative difference below which a network in float32 hardly sees what one in float64 separates."""
_POOLS = {"se3": "se3_pool", "so3": "so3_pool"}
_LEAST = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Separation:
    """How far apart one view puts the crystals of a pair.

    Attributes:
        distances: |a − b| / |a| of the embeddings, one an initialisation.
        rounding: the largest such distance between two descriptions of one crystal.
    """

    distances: tuple[float, ...]
    rounding: float

    @property
    def threshold(self) -> float:
        """Distance above which the crystals count as separated."""
        return MARGIN * max(self.rounding, _LEAST)

    @property
    def median(self) -> float:
        """Median of the distances."""
        return float(np.median(self.distances))

    @property
    def verdict(self) -> str:
        """Return "separated" or "confused" if all initialisations say so, else "undecided"."""
        above = [distance > self.threshold for distance in self.distances]
        return "separated" if all(above) else "undecided" if any(above) else "confused"

    @property
    def faint(self) -> bool:
        """Whether the crystals are separated by less than float32 resolves."""
        return self.verdict == "separated" and self.median < FAINT


@dataclass(frozen=True)
class Finding:
    """What tells a pair apart on graphs of so many neighbours.

    Attributes:
        pair: the crystals.
        max_neighbors: of the graphs.
        neighbors: mean number of an atom's neighbours in both crystals, whole shells.
        baselines: whether distances alone separate the pair: "pairs" (radial distribution function), "atoms"
            (each atom's list), "refinement" (colour refinement to the end).
        views: of the SE(3) and the SO(3) view ("se3", "so3").
    """

    pair: Pair
    max_neighbors: int
    neighbors: tuple[float, float]
    baselines: Mapping[str, bool]
    views: Mapping[str, Separation]


@dataclass(frozen=True)
class ModelFinding:
    """What a trained network makes of a pair, in float64.

    Attributes:
        model: its name.
        target, unit: what it predicts.
        pair: the crystals.
        max_neighbors: of the graphs that it was trained on.
        predictions: of both.
        rounding: largest difference of predictions between two descriptions of one crystal.
        views: of the views that it has.
    """

    model: str
    target: str | None
    unit: str | None
    pair: Pair
    max_neighbors: int
    predictions: tuple[float, float]
    rounding: float
    views: Mapping[str, Separation]

    @property
    def separated(self) -> bool:
        """Whether the predictions differ by more than rounding."""
        first, second = self.predictions
        least = _LEAST * max(abs(first), abs(second))
        return abs(first - second) > MARGIN * max(self.rounding, least)


def completeness_study(
    folder: str | Path,
    console: Console,
    models: Sequence[str | Path] = (),
    neighbors: Sequence[int] = (12, 25),
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    pairs: Sequence[Pair] = PAIRS,
) -> Report:
    """Probe views and models with pairs of crystals, on the CPU, and write the report.

    Args:
        folder: where the report goes.
        console: where tables go.
        models: run folders or checkpoints to look at as well, on the graphs they were trained on.
        neighbors: numbers of neighbours to probe at.
        seeds: of the networks of random weights.
        pairs: of crystals.

    Raises:
        ValueError: if there is no number of neighbours or seed, or a model is given twice or predicts several
            properties.
    """
    if not neighbors or not seeds:
        raise ValueError("give at least one number of neighbours (--neighbors) and one seed (--seeds)")
    paths = name_models(models) if models else {}
    networks = {name: load_model(path, device="cpu") for name, path in paths.items()}
    batch = redescribed(pairs)
    findings = [finding for count in neighbors for finding in probe(pairs, batch, count, seeds)]
    of_models = [
        one for name, network in networks.items() for one in probe_model(name, network, pairs, batch)
    ]
    report = report_on(
        findings,
        of_models,
        settings={
            "models": paths,
            "neighbors": list(neighbors),
            "seeds": list(seeds),
            "network": NETWORK,
            "descriptions": DESCRIPTIONS,
            "margin": MARGIN,
        },
        environment=environment(torch.device("cpu"), {}),
    )
    write_report(folder, report, lambda path: draw(path, findings), console)
    return report


def redescribed(pairs: Sequence[Pair], seed: int = 0) -> CrystalBatch:
    """Build both crystals of each pair, each followed by `DESCRIPTIONS` other descriptions of it."""
    rng = np.random.default_rng(seed)
    structures = [
        described
        for pair in pairs
        for structure in pair.build()
        for described in (structure, *(describe_anew(structure, rng) for _ in range(DESCRIPTIONS)))
    ]
    return CrystalBatch.from_structures(structures)


def describe_anew(structure: Structure, rng: np.random.Generator) -> Structure:
    """Describe the same crystal with another cell, origin, order of atoms and orientation."""
    change = np.eye(3)
    for _ in range(3):
        row, other = rng.choice(3, 2, replace=False)
        change[row] += rng.choice((-1, 1)) * change[other]
    cell = change @ structure.lattice.matrix @ Rotation.random(rng=rng).as_matrix()
    coords = structure.frac_coords @ np.linalg.inv(change) + rng.uniform(-1, 1, 3)
    order = rng.permutation(len(structure))
    return Structure(Lattice(cell), [structure[int(i)].specie for i in order], coords[order])


def probe(
    pairs: Sequence[Pair], batch: CrystalBatch, max_neighbors: int, seeds: Sequence[int]
) -> list[Finding]:
    """Probe distances and both views with networks of random weights; see `redescribed` for the batch."""
    graph = build_graph(batch, max_neighbors)
    outputs = []
    for seed in seeds:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            network = MGT(NETWORK, backend="torch").double().eval()
        with torch.no_grad():
            outputs.append(network(graph))
    degrees = graph.row_ptr[graph.batch_ptr].diff() / graph.batch_ptr.diff()
    findings = []
    for number, pair in enumerate(pairs):
        first, second = _places(number)
        two = CrystalBatch.from_structures(pair.build())
        edges = graph.row_ptr[graph.batch_ptr]
        reach = max(
            float(graph.edge_vec[edges[place] : edges[place + 1]].norm(dim=1).max())
            for place in (first, second)
        )
        findings.append(
            Finding(
                pair=pair,
                max_neighbors=max_neighbors,
                neighbors=(float(degrees[first]), float(degrees[second])),
                baselines={
                    "pairs": pair_distances_separate(two, reach),
                    "atoms": refinement_separates(two, max_neighbors, rounds=1),
                    "refinement": refinement_separates(two, max_neighbors),
                },
                views=_separations(outputs, number),
            )
        )
    return findings


def probe_model(name: str, network: MGT, pairs: Sequence[Pair], batch: CrystalBatch) -> list[ModelFinding]:
    """Look at the predictions of a trained network, turned to float64, and at its views.

    Raises:
        ValueError: if it predicts several properties, or none.
    """
    meta = prediction_meta(network)
    if network.config.output_dim != 1:
        raise ValueError(f"{name} predicts {network.config.output_dim} properties; only one is looked at")
    network = network.double().eval()
    with torch.no_grad():
        output = network(
            build_graph(batch, meta.max_neighbors, meta.compat, shell_tolerance=meta.shell_tolerance)
        )
    predictions = meta.scaling.unscale(output.prediction[:, 0].numpy())
    findings = []
    for number, pair in enumerate(pairs):
        first, second = _places(number)
        own = predictions[[first, second]][:, None]
        others = np.stack([predictions[_others(place)] for place in (first, second)])
        findings.append(
            ModelFinding(
                model=name,
                target=meta.target,
                unit=meta.unit,
                pair=pair,
                max_neighbors=meta.max_neighbors,
                predictions=(float(predictions[first]), float(predictions[second])),
                rounding=float(np.abs(others - own).max()),
                views=_separations([output], number),
            )
        )
    return findings


def _places(number: int) -> tuple[int, int]:
    """Return where the two crystals of a pair stand in the batch of `redescribed`."""
    stride = 1 + DESCRIPTIONS
    return 2 * number * stride, (2 * number + 1) * stride


def _others(place: int) -> slice:
    """Return where the other descriptions of the crystal at a place stand."""
    return slice(place + 1, place + 1 + DESCRIPTIONS)


def _separations(outputs: Sequence[MGTOutput], number: int) -> dict[str, Separation]:
    """Compare the embeddings of a pair in each view that the networks have."""
    first, second = _places(number)
    found = {}
    for view, name in _POOLS.items():
        pools = [getattr(output, name) for output in outputs]
        if pools[0] is None:
            continue
        found[view] = Separation(
            distances=tuple(float(_relative(pool[first], pool[second])) for pool in pools),
            rounding=max(
                float(_relative(pool[place], pool[_others(place)]).max())
                for pool in pools
                for place in (first, second)
            ),
        )
    return found


def _relative(one: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return |one − others| / |one| over the last dimension."""
    return (one - others).norm(dim=-1) / one.norm()
