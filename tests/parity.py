"""Check a model against golden figures of the published program.

    python tests/parity.py tests/golden/official_small.safetensors --backend reference

A fixture holds a batch of crystal graphs, the state_dict of a pretraining and of a fine-tuning model, and
what the published program computed from them in float64: outputs, losses, gradients and BatchNorm
statistics. Sizes are read from its tensors. The worst relative error (norm of the difference over norm) of
each group is shown; the exit status is 1 where one exceeds its tolerance. What the fixture lacks, or the
model, is an infinite error, never left out.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from mgt_fast.elements import cgcnn_features
from mgt_fast.graph import CrystalGraph
from mgt_fast.importer import config_from_state_dict, published_state_dict
from mgt_fast.outputs import EdgeNoise

GOLDEN = Path(__file__).parent / "golden" / "official_small.safetensors"
BACKENDS = ("reference", "torch", "triton")
TASKS = {"pretraining": "pretrain", "finetune": "predict"}
TOLERANCES = {"inputs": 1e-5, "outputs": 1e-5, "losses": 1e-5, "gradients": 1e-4, "buffers": 1e-5}
# Gradients that vanish identically (a bias in front of a BatchNorm) are rounding noise in both programs, some
# 1e-13 of all gradients together: below this share of them a difference is measured against the share.
GRADIENT_FLOOR = 1e-7


@dataclass(frozen=True)
class Check:
    """Relative error of one tensor."""

    task: str
    mode: str
    group: str
    name: str
    error: float

    @property
    def passed(self) -> bool:
        return self.error <= TOLERANCES[self.group]  # False for NaN


def relative_error(ours: torch.Tensor | None, golden: torch.Tensor | None, floor: float = 0.0) -> float:
    """Norm of the difference over the golden norm (`floor` at least); infinite where one is absent."""
    if ours is None or golden is None or ours.numel() != golden.numel():
        return math.inf
    golden = golden.double().flatten()
    difference = float((ours.detach().double().cpu().flatten() - golden).norm())
    if difference == 0:
        return 0.0
    return difference / scale if (scale := max(float(golden.norm()), floor)) else math.inf


def fixture_graph(tensors: dict[str, torch.Tensor]) -> tuple[CrystalGraph, EdgeNoise, list[Check]]:
    """Return the fixture's graph (float64, edges sorted), its noise, and checks of the inputs.

    The noise of the cosines is the fixture's noisy cosine less the clean one as computed here in float64
    from vectors and frame, not less the fixture's own float32 clean cosine: so the model, which adds the
    noise to the cosine that it computes itself, sees exactly the fixture's noisy cosines.
    """
    golden = {name.removeprefix("input."): t for name, t in tensors.items() if name.startswith("input.")}
    num_atoms, edge_index = golden["num_atoms"], golden["edge_index"]
    order = torch.argsort(edge_index[0] * int(num_atoms.sum()) + edge_index[1], stable=True)
    edge_index = edge_index[:, order]
    degree = torch.bincount(edge_index[0], minlength=int(num_atoms.sum()))
    graph = CrystalGraph(
        numbers=golden["numbers"],
        edge_index=edge_index,
        edge_vec=golden["edge_vector"][order].double(),
        cell_shift=torch.zeros(len(order), 3, dtype=torch.int32),  # not in the fixture; no model reads it
        frame=golden["lattice_vectors"].double(),
        batch_ptr=torch.cat([num_atoms.new_zeros(1), num_atoms.cumsum(0)]),
        row_ptr=torch.cat([degree.new_zeros(1), degree.cumsum(0)]),
        ids=tuple(str(b) for b in range(len(num_atoms))),
    )
    frame = graph.frame[graph.batch[edge_index[0]]]  # [E, 3, 3]
    cosine = torch.nn.functional.cosine_similarity(frame, graph.edge_vec[:, None], dim=-1).clamp(-1, 1)
    noise = EdgeNoise(
        cosine=golden["edge_lattice_cosine_noisy"][order].double() - cosine,
        vector=golden["edge_vector_noisy"][order].double() - graph.edge_vec,
    )
    inputs = {
        "atom_features": (cgcnn_features()[graph.numbers], golden["atom_features"]),
        "node_graph": (graph.batch, golden["node_graph"]),
        "edge_lattice_cosine": (cosine, golden["edge_lattice_cosine"][order]),
        "edge_lattice_length_feature": (
            -0.75 / frame.norm(dim=-1),
            golden["edge_lattice_length_feature"][order],
        ),
    }
    checks = [Check("input", "", "inputs", name, relative_error(*pair)) for name, pair in inputs.items()]
    return graph, noise, checks


def build_model(config, backend: str) -> torch.nn.Module:
    """Return the model behind a backend's name."""
    if backend == "reference":
        from mgt_fast.reference import ReferenceMGT

        return ReferenceMGT(config)
    from mgt_fast.model import MGT

    return MGT(config, backend=backend)


def pretraining_parts(output, graph, noise, backend: str) -> dict[str, torch.Tensor]:
    """Return the loss ("output"), its contrastive part and the denoising targets, by the fixture's names."""
    if backend == "reference":
        from mgt_fast.reference import reference_pretraining_loss

        parts = reference_pretraining_loss(output, graph, noise)
        return {"output": parts.pop("loss"), **parts}
    from mgt_fast.layers import GraphIndex
    from mgt_fast.losses import noise_per_crystal, pretraining_loss

    loss, index = pretraining_loss(output, graph, noise), GraphIndex(graph)
    return {
        "output": loss.total,
        "contrastive": loss.contrastive,
        "se3_target": noise_per_crystal(noise.cosine, index),
        "so3_target": noise_per_crystal(noise.vector, index),
    }


def check_task(
    task: str, tensors: dict[str, torch.Tensor], graph: CrystalGraph, noise: EdgeNoise, backend: str
) -> Iterator[Check]:
    """Check one of the fixture's two models in eval and in train mode."""
    golden = {name.removeprefix(f"{task}."): t for name, t in tensors.items() if name.startswith(f"{task}.")}
    state = {n.removeprefix("state_dict."): t for n, t in golden.items() if n.startswith("state_dict.")}
    state, _ = published_state_dict(state)
    config = config_from_state_dict(state)
    if config.task != TASKS[task]:
        raise ValueError(f"the fixture's {task!r} model has the parameters of the task {config.task!r}")
    model = build_model(replace(config, dropout=0.0), backend)
    model.load_state_dict(state, strict=True)
    model.to(graph.edge_vec.device, torch.float64)

    for mode in ("eval", "train"):
        model.train(mode == "train")
        output = model(graph, noise)
        outputs, losses = {"se3_pool": output.se3_pool, "so3_pool": output.so3_pool}, {}
        if task == "pretraining":
            outputs |= {"se3_pred": output.se3_noise, "so3_pred": output.so3_noise}
            parts = pretraining_parts(output, graph, noise, backend)
            losses = {k: parts[k] for k in ("output", "contrastive", "se3_target", "so3_target")}
            objective = parts["output"]
        else:
            outputs["output"] = output.prediction
            weights = torch.linspace(-1, 1, graph.num_crystals).to(output.prediction)
            objective = (weights[:, None] * output.prediction).sum()
        for group, values in (("outputs", outputs), ("losses", losses)):
            for name, value in values.items():
                yield Check(task, mode, group, name, relative_error(value, golden.get(f"{mode}.{name}")))

    objective.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    theirs = {n.removeprefix("train.grad."): t for n, t in golden.items() if n.startswith("train.grad.")}
    floor = GRADIENT_FLOOR * math.sqrt(sum(float(t.double().square().sum()) for t in theirs.values()))
    for name in sorted(ours.keys() | theirs.keys()):
        error = relative_error(ours.get(name), theirs.get(name), floor)
        yield Check(task, "train", "gradients", name, error)

    ours = {name: buffer for name, buffer in model.named_buffers() if "running_" in name}
    theirs = {n.removeprefix("train.buffer."): t for n, t in golden.items() if n.startswith("train.buffer.")}
    for name in sorted(ours.keys() | theirs.keys()):
        yield Check(task, "train", "buffers", name, relative_error(ours.get(name), theirs.get(name)))


def run_parity(tensors: dict[str, torch.Tensor], backend: str, device: str = "cpu") -> list[Check]:
    """Check a backend against the tensors of a fixture, in float64."""
    graph, noise, checks = fixture_graph(tensors)
    graph = graph.to(device=device)
    noise = EdgeNoise(cosine=noise.cosine.to(device), vector=noise.vector.to(device))
    for task in TASKS:
        checks += check_task(task, tensors, graph, noise, backend)
    return checks


def table(checks: list[Check]) -> str:
    """Return one line a group with its worst tensor."""
    groups: dict[tuple[str, str, str], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.task, check.mode, check.group), []).append(check)
    lines = [f"{'task':<12} {'mode':<6} {'group':<10} {'tensors':>7} {'worst':>9} {'limit':>7}       tensor"]
    for (task, mode, group), members in groups.items():
        worst = max(members, key=lambda check: math.inf if math.isnan(check.error) else check.error)
        verdict = "ok" if all(check.passed for check in members) else "FAILED"
        lines.append(
            f"{task:<12} {mode:<6} {group:<10} {len(members):>7} {worst.error:>9.1e} "
            f"{TOLERANCES[group]:>7.0e} {verdict:<6}{worst.name}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description="Check a model against figures of the published program.")
    parser.add_argument("fixture", nargs="?", default=GOLDEN, help=f"laid out as {GOLDEN.name} (the default)")
    parser.add_argument("--backend", choices=BACKENDS, default="torch")
    parser.add_argument("--device", default="cpu", help="torch device to run the model on")
    arguments = parser.parse_args(argv)
    try:
        checks = run_parity(load_file(arguments.fixture), arguments.backend, arguments.device)
    except (OSError, NotImplementedError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(table(checks) + "\n")
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
