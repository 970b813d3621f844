"""Warnings of a router that stagnates: never on a healthy run, always and once on one that stands still."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_runs import run

from mgt_fast.checkpoint import load_model, save_checkpoint
from mgt_fast.train.config import ConfigError, FinetuneConfig, RouterMonitorConfig, load_config
from mgt_fast.train.runlog import read_metrics
from mgt_fast.train.stagnation import router_state, share_figures, stagnation

MONITOR = RouterMonitorConfig(epochs=3)
WELL, EVEN, SE3, SO3 = (0.6, 0.2), (0.51, 0.01), (0.01, 0.03), (0.97, 0.0)
STILL = ("optim.lr=1e-12", "optim.weight_decay=0", "optim.epochs=3", "checkpoint.keep=9")


def records(*figures):
    return [
        {"epoch": epoch, "val_so3_share": mean, "val_so3_share_std": spread, "val_one_view": 0.0}
        for epoch, (mean, spread) in enumerate(figures, 1)
    ]


def warned_after(figures, monitor=MONITOR):
    """Epochs after which the monitor warns."""
    history = records(*figures)
    return [epoch for epoch in range(len(history) + 1) if stagnation(history[:epoch], monitor)]


def warnings_in(said):
    return [line for line in said.splitlines() if line.startswith("warning: ")]


def test_figures_of_an_epoch():
    so3 = np.array([0.0, 0.04, 0.5, 0.96])
    figures = share_figures(np.stack((1 - so3, so3), axis=1), MONITOR)
    assert figures == {
        "val_so3_share": pytest.approx(so3.mean()),
        "val_so3_share_std": pytest.approx(so3.std()),
        "val_one_view": 0.75,
    }


@pytest.mark.parametrize(
    ("mean", "spread", "state"),
    [
        (0.5, 0.02, "even"),
        (0.519, 0.0, "even"),
        (0.5, 0.03, None),  # even in the mean, but crystals differ
        (0.53, 0.0, None),
        (0.95, 0.05, "so3"),
        (0.94, 0.0, None),
        (0.05, 0.05, "se3"),
        (0.06, 0.0, None),
    ],
)
def test_states(mean, spread, state):
    assert router_state(records((mean, spread))[0], MONITOR) == state


def test_warns_once_an_episode():
    assert warned_after([EVEN] * 2) == []
    assert warned_after([EVEN] * 9) == [3]
    assert warned_after([WELL] * 9) == []
    assert warned_after([SO3] * 4 + [WELL] + [SO3] * 4) == [3, 8]
    assert warned_after([EVEN, EVEN, SE3, SE3, SE3]) == [5]  # another place is another episode
    assert warned_after([SE3] * 2, RouterMonitorConfig(epochs=1)) == [1]
    assert warned_after([SE3] * 9, RouterMonitorConfig(epochs=None)) == []


def test_epochs_without_figures_end_an_episode():
    history = records(*[EVEN] * 4)
    del history[1]["val_so3_share"]
    assert stagnation(history[:3], MONITOR) is stagnation(history, MONITOR) is None
    assert stagnation([], MONITOR) is None


def test_a_warning_has_figures_and_remedies_that_exist():
    warning = stagnation(records(*[SE3] * 3), MONITOR)
    assert "epoch 3" in warning
    assert "0.010 ± 0.030" in warning
    assert "from the SE(3) view" in warning
    assert "model.views=se3" in warning
    load_config(FinetuneConfig, overrides=["model.views=se3"])
    load_config(FinetuneConfig, overrides=["model.fusion=concat"])


def test_thresholds_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"router_monitor\.one_view"):
        load_config(FinetuneConfig, overrides=["router_monitor.one_view=0.4"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose router works: folder, and what it said."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return folder, run("finetune", folder, "router_monitor.epochs=1", "optim.lr=1e-3")


def stuck(trained, folder, state):
    """Write a checkpoint whose router stands at a state for every crystal."""
    model = load_model(trained[0])
    router = model.mixture_of_experts
    with torch.no_grad():
        for expert in router.experts:  # the same prediction for every crystal
            expert.expert2.weight.zero_()
            expert.expert2.bias.fill_(1)
        router.projection.weight.fill_(1)
        if state != "even":
            router.projection.weight[0, ("so3", "se3").index(state)] = 1e-3
    save_checkpoint(folder / "stuck.safetensors", model, replace(model.meta))
    return folder / "stuck.safetensors"


def test_a_healthy_run_is_not_warned_of(trained):
    folder, said = trained
    shares = [(record["val_so3_share"], record["val_so3_share_std"]) for record in read_metrics(folder)]
    assert len(shares) == 2
    assert all(0.05 < mean < 0.95 for mean, _ in shares)
    assert warnings_in(said) == []


@pytest.mark.parametrize("state", ["even", "se3", "so3"])
def test_a_run_that_stands_still_is_warned_of_once(trained, tmp_path, state):
    start = stuck(trained, tmp_path, state)
    said = run("finetune", tmp_path / "run", *STILL, "router_monitor.epochs=2", start=start)
    (warning,) = warnings_in(said)
    assert "epoch 2: the router stagnates" in warning
    assert f"model.views={state}" in warning or state == "even"
    share = {"even": 0.5, "se3": 0.0, "so3": 1.0}[state]
    figures = [record["val_so3_share"] for record in read_metrics(tmp_path / "run")]
    assert figures == [pytest.approx(share, abs=2e-3)] * 3


def test_a_resumed_run_remembers_the_epochs_before(trained, tmp_path):
    start = stuck(trained, tmp_path, "so3")
    settings = (*STILL, "router_monitor.epochs=2")
    run("finetune", tmp_path / "run", *settings, start=start)
    after_first = run("finetune", tmp_path / "run", *settings, start=start, resume=True, resume_from=3)
    assert len(warnings_in(after_first)) == 1
    after_second = run("finetune", tmp_path / "run", *settings, start=start, resume=True, resume_from=6)
    assert warnings_in(after_second) == []  # it was said before
    other = (*STILL, "router_monitor.epochs=3")  # what is warned of may change
    assert len(
        warnings_in(run("finetune", tmp_path / "run", *other, start=start, resume=True, resume_from=6))
    )


@pytest.mark.parametrize("change", ["model.fusion=concat", "model.views=se3"])
def test_without_a_router_there_is_nothing_to_watch(tmp_path, change):
    said = run("finetune", tmp_path, change, "optim.epochs=1", "router_monitor.epochs=1")
    assert "val_so3_share" not in read_metrics(tmp_path)[0]
    assert warnings_in(said) == []
