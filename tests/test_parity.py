"""Agreement with the published program, and that a disagreement does not pass."""

from __future__ import annotations

import pytest
import torch
from parity import GOLDEN, TASKS, main, run_parity
from safetensors.torch import load_file, save_file


def failures(tensors, backend="reference"):
    return {(c.task, c.mode, c.group, c.name) for c in run_parity(tensors, backend) if not c.passed}


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_published_program_is_met(backend, capsys):
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    assert main([str(GOLDEN), "--backend", backend, "--device", device]) == 0
    shown = [line.split()[:3] for line in capsys.readouterr().out.splitlines() if " ok " in line]
    for task in TASKS:
        for group in ("outputs", "gradients", "buffers"):
            assert [task, "train", group] in shown


def test_every_golden_figure_is_checked():
    tensors, parts = load_file(GOLDEN), {"gradients": "grad.", "buffers": "buffer."}
    checked = {
        f"{c.task}.{c.mode}.{parts.get(c.group, '')}{c.name}"
        for c in run_parity(tensors, "reference")
        if c.group != "inputs"
    }
    golden = [name for name in tensors if not name.startswith("input.")]
    assert checked == {name for name in golden if ".state_dict." not in name}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("task", TASKS)
def test_one_changed_parameter_fails(backend, task, tmp_path, capsys):
    tensors = load_file(GOLDEN)
    tensors[f"{task}.state_dict.so3_graph_encoder.equi_update.1.nlayer_2.fc.2.bias"][3] += 1e-2
    save_file(tensors, tmp_path / "changed.safetensors")
    assert main([str(tmp_path / "changed.safetensors"), "--backend", backend]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert failed
    assert all(line.startswith(task) for line in failed)


@pytest.mark.parametrize(
    ("entry", "group"),
    [
        ("pretraining.eval.contrastive", "losses"),
        ("pretraining.train.so3_pred", "outputs"),
        ("finetune.train.grad.mixture_of_experts.attention_gate.attention.in_proj_weight", "gradients"),
        ("finetune.train.buffer.se3_graph_encoder.edges_layer.1.bn_att.running_var", "buffers"),
    ],
)
@pytest.mark.parametrize("change", ["drop", "scale", "nan"])
def test_a_lacking_or_wrong_golden_figure_fails(entry, group, change):
    tensors = load_file(GOLDEN)
    if change == "drop":
        del tensors[entry]
    else:
        tensors[entry] = tensors[entry] * (1.001 if change == "scale" else torch.nan)
    task, mode, name = entry.split(".", 2)
    name = name.removeprefix("grad.").removeprefix("buffer.")
    failed = failures(tensors)
    assert (task, mode, group, name) in failed
    # NaN among the gradients leaves no scale to measure the vanishing ones against.
    assert failed == {(task, mode, group, name)} or (change, group) == ("nan", "gradients")


def test_a_gradient_the_model_lacks_fails():
    tensors = load_file(GOLDEN)
    tensors["pretraining.train.grad.no_such.weight"] = torch.ones(3)
    assert failures(tensors) == {("pretraining", "train", "gradients", "no_such.weight")}


def test_a_vanishing_gradient_must_vanish():
    tensors = load_file(GOLDEN)
    name = "so3_graph_encoder.transconv.0.lin_concate.bias"  # in front of a BatchNorm
    tensors[f"pretraining.train.grad.{name}"] += 1e-6
    assert failures(tensors) == {("pretraining", "train", "gradients", name)}


def test_other_atom_features_fail():
    tensors = load_file(GOLDEN)
    tensors["input.numbers"] = tensors["input.numbers"] + 1
    assert ("input", "", "inputs", "atom_features") in failures(tensors)


def test_a_fixture_without_one_of_the_models_is_refused():
    tensors = {k: v for k, v in load_file(GOLDEN).items() if not k.startswith("finetune.")}
    with pytest.raises(ValueError, match="mixture_of_experts"):
        run_parity(tensors, "reference")
