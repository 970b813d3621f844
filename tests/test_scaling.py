"""Scaling on paper: the counted exchanges are those of a real step, and the modelled times behave."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from mgt_fast.distributed import Ranks
from mgt_fast.losses import nt_xent_gradient
from mgt_fast.train.config import FinetuneConfig, PretrainConfig, load_config
from mgt_fast.train.finetune import finetuning_task
from mgt_fast.train.loop import Fit
from mgt_fast.train.pretrain import pretraining_task
from mgt_fast.train.runlog import NullLog

BENCH = Path(__file__).parents[1] / "bench"
BATCH = 6
GATHER_OBJECT = dist.all_gather_object
SMALL = [
    "data.limit=24",
    "model.channels=8",
    "model.num_scalars=4",
    "model.num_vectors=2",
    f"optim.batch_size={BATCH}",
    "optim.epochs=1",
    "optim.warmup_epochs=0",
    "device=cpu",
]
KINDS = {
    "pretrain": (PretrainConfig, pretraining_task),
    "one view": (PretrainConfig, pretraining_task),
    "finetune": (FinetuneConfig, finetuning_task),
}


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("scaling")


def configured(kind, statistics):
    values = [*SMALL, f"optim.statistics={statistics}"]
    return load_config(KINDS[kind][0], overrides=values + ["model.views=se3"] * (kind == "one view"))


class Steps(NullLog):
    """Notes what ranks exchange, and between which steps."""

    def __init__(self):
        super().__init__(".", Console())
        self.exchanged = []

    def record_step(self, step, epoch, values):
        self.exchanged.append(step)

    def note(self, name, collective, of):
        def noting(*args, **kwargs):
            tensor = args[of]
            self.exchanged.append((name, tensor.numel() * tensor.element_size()))
            return collective(*args, **kwargs)

        return noting

    def note_object(self, *args, **kwargs):
        """Pickled objects, of unknown size, belong into no step."""
        self.exchanged.append(("all_gather_object", 0))
        return GATHER_OBJECT(*args, **kwargs)


def exchanged_in_steps(rank, cases):
    """Train an epoch of each kind and return what its second step gives to torch.distributed."""
    steps = Steps()
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    for name, collective, of in (("all_reduce", "all_reduce", 0), ("all_gather", gather, 1)):
        setattr(dist, collective, steps.note(name, getattr(dist, collective), of))
    dist.all_gather_object = steps.note_object
    found, ranks = [], Ranks()
    for kind, statistics in cases:
        config = configured(kind, statistics)
        task, _ = KINDS[kind][1](config, torch.device("cpu"), ranks)
        steps.exchanged = []
        Fit(task, config.optim, steps, lambda *_: None, ranks=ranks).run()
        found.append(steps.exchanged[steps.exchanged.index(1) + 1 : steps.exchanged.index(2)])
    return found


def test_counted_exchanges_are_those_of_a_step(scaling, tmp_path):
    cases = [(kind, statistics) for kind in KINDS for statistics in ("global", "local")]
    for of_rank in run_ranks(exchanged_in_steps, 2, tmp_path, cases):
        for (kind, statistics), found in zip(cases, of_rank, strict=True):
            counted = scaling.exchanges(configured(kind, statistics).model, BATCH, statistics)
            assert sorted(found) == sorted(
                (e.collective, e.num_bytes) for e in counted for _ in range(e.times)
            )


def test_published_network(scaling):
    gradients = next(e for e in scaling.exchanges(scaling.PUBLISHED, 128) if e.name == "gradients")
    assert gradients.num_bytes / 4 == pytest.approx(12.2e6, rel=0.005)


def test_ring_sends_what_it_must(scaling):
    fast = scaling.Network("", bandwidth=1e9, ranks=1)
    whole = scaling.Exchange("", "all_reduce", 10**9)
    part = scaling.Exchange("", "all_gather", 10**9 // 64)
    assert scaling.exchange_seconds(whole, 64, fast) == pytest.approx(2 * 63 / 64, rel=1e-2)
    assert scaling.exchange_seconds(part, 64, fast) == pytest.approx(63 / 64, rel=1e-2)
    assert scaling.exchange_seconds(whole, 1, fast) == 0.0


def test_small_exchanges_cost_hops(scaling):
    one = scaling.Exchange("", "all_gather", 8)
    within, between = scaling.NETWORKS[0], scaling.NETWORKS[1]
    assert scaling.exchange_seconds(one, 8, within) == pytest.approx(3.6e-6 + 7 * 0.47e-6, rel=1e-3)
    assert scaling.exchange_seconds(one, 16, between) == pytest.approx(
        3.6e-6 + 14 * 0.47e-6 + 2.7e-6, rel=1e-3
    )
    twice = scaling.Exchange("", "all_gather", 8, 2)
    assert scaling.exchange_seconds(twice, 8, within) == 2 * scaling.exchange_seconds(one, 8, within)


def test_least_time_is_below_that_of_all_products(scaling):
    costs = importlib.import_module("costs")
    sizes = costs.Sizes(100_000 // 28, 100_000, 100_000 // 307)
    products = 3 * costs.model_flops(sizes) / 989e12 / 100_000
    assert products <= scaling.roof_seconds_per_edge() < 2 * products


@pytest.mark.parametrize("rank", [0, 1])
def test_products_of_the_contrast(scaling, rank):
    device = scaling.predicted_device(1.0)
    with FlopCounterMode(display=False) as counter:
        nt_xent_gradient(*torch.randn(2, 40, scaling.PUBLISHED.channels), part=rank, parts=2)
    parts = scaling.step_parts(device, scaling.NETWORKS[0], 2, 20)
    assert parts["contrast"] * device.float32 == pytest.approx(counter.get_total_flops())


def test_limits_are_the_first_ranks_that_wait(scaling):
    network = scaling.NETWORKS[1]
    device = scaling.Device("d", True, lambda edges: 1e-5 * edges, 1e12, (network,))
    row = scaling.limits_table([device]).splitlines()[-1].strip("| ").split(" | ")
    names = ("contrast", *scaling.EXCHANGED)
    for name, cell in zip(names, row[2:], strict=True):
        for crystals, ranks in zip(scaling.CRYSTALS, cell.split(" / "), strict=True):
            first = network.most_ranks + 1 if ranks == "–" else int(ranks)
            for num_ranks in (first - 1, first):
                parts = scaling.step_parts(device, network, num_ranks, crystals)
                waits = parts[name] >= parts["own crystals"]
                assert waits == (num_ranks == first <= network.most_ranks)


def test_communication_is_the_rest_of_a_step(scaling):
    parts = scaling.step_parts(scaling.predicted_device(1.0), scaling.NETWORKS[1], 64, 128)
    own = parts["own crystals"] + parts["contrast"]
    assert scaling.communication(parts) == pytest.approx(1 - own / sum(parts.values()))


def record(device, rival, times, **versions):
    steps = {
        str(edges): {
            "group": f"training step, C = 256, {edges} edges",
            "rival": rival,
            "edges": edges,
            "us_per_edge": us,
            "versions": versions,
        }
        for edges, us in times.items()
    }
    return steps | {
        "ceilings": {"device": device, "float32": 6e13},
        "broken": {"group": "x", "unmeasured": "no"},
    }


def test_measured_gpu_takes_the_place_of_predictions(scaling, tmp_path):
    write = importlib.import_module("record").write
    write(tmp_path / "cpu.json", record("A CPU", "torch-float32", {10_000: 170.0}))
    assert [device.measured for device in scaling.devices(tmp_path)] == [True, False, False]
    write(tmp_path / "gpu.json", record("A GPU", "triton-bf16", {10**4: 0.4, 10**6: 0.2}, cuda="13.0"))
    write(tmp_path / "other.json", {"runs": []})
    cpu, gpu = scaling.devices(tmp_path)
    assert cpu.networks is scaling.CPU_NETWORKS
    assert gpu.networks is scaling.NETWORKS
    assert gpu.seconds(10**5) == pytest.approx(0.3e-6 * 10**5)
    assert gpu.seconds(10) == pytest.approx(0.4e-6 * 10)


def test_one_command_renews_tables_and_picture(scaling, tmp_path):
    write = importlib.import_module("record").write
    write(tmp_path / "gpu.json", record("A GPU", "triton-bf16", {10**5: 0.2}, cuda="13.0"))
    names = ("exchanges", "parts", "ranks", "limits", "published", "cost")
    page = tmp_path / "scaling.md"
    page.write_text(
        "before\n" + "".join(f"<!-- {name} -->\nold\n<!-- end -->\n" for name in names) + "after\n"
    )
    arguments = ["--results", str(tmp_path), "--docs", str(tmp_path)]
    scaling.main(arguments)
    text = page.read_text()
    assert "old" not in text
    assert "predicted" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "A GPU, triton-bf16, measured" in text
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    scaling.main(arguments)
    assert page.read_text() == text
    with pytest.raises(ValueError, match="<!-- cost -->"):
        scaling.fill("", {"cost": ""})
