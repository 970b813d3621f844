"""What the benchmarks count, and how runs become records; their times are no matter of tests."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mgt_fast import MGT, MGTConfig, build_graph
from mgt_fast.data import CrystalDataset

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


def test_counted_operations_are_those_of_the_model(bench):
    costs = bench("costs")
    config = MGTConfig(task="pretrain", channels=32, dropout=0.0)
    dataset = CrystalDataset.open(None)

    def counted(num_crystals):
        graph = build_graph(dataset.gather(range(num_crystals)))
        # Lengths and angles that are equal are embedded once: disturbed, no two are.
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(graph.edge_vec.shape, generator=generator, dtype=torch.float64)
        graph = replace(graph, edge_vec=graph.edge_vec + 1e-2 * noise)
        with FlopCounterMode(display=False) as counter:
            MGT(config, backend="torch")(graph)
        sizes = costs.Sizes(graph.num_atoms, graph.num_edges, graph.num_crystals, channels=32)
        by_hand = costs.model_flops(sizes) - costs.rbf_embedding(sizes, 5 * graph.num_edges).flops
        return counter.get_total_flops(), by_hand

    # Between two batches, products of weights alone, which are made once a step, cancel.
    (small, small_by_hand), (large, large_by_hand) = counted(4), counted(16)
    assert large - small == pytest.approx(large_by_hand - small_by_hand, rel=0.02)


def test_published_size(bench):
    costs = bench("costs")
    sizes = costs.Sizes(num_atoms=1000, num_edges=28_000, num_crystals=100)
    assert costs.model_flops(sizes) / sizes.num_edges == pytest.approx(7.6e6, rel=0.02)


def test_cost_names_the_nearer_roof(bench):
    costs = bench("costs")
    cost = costs.Cost(flops=100.0, bytes=10.0)
    assert cost.roof(flop_rate=10.0, bandwidth=2.0) == "products"
    assert cost.floor(flop_rate=10.0, bandwidth=2.0) == 10.0
    assert cost.roof(flop_rate=100.0, bandwidth=2.0) == "memory"
    assert cost.floor(flop_rate=100.0, bandwidth=2.0) == 5.0


def run_file(path, *, name="bench_kernels.py::bench_kernel[a]", median=1e-3, smoke=False, unmeasured=()):
    info = {
        "operation": "edge_attention",
        "direction": "forward",
        "rival": "triton-bf16",
        "channels": 256,
        "edges": 100,
        "tflops": 1.0,
        "gbytes_per_s": 2.0,
        "intensity": 3.0,
        "roof": "memory",
        "share": 0.5,
    }
    stats = {"median": median, "iqr": 0.0, "rounds": 5}
    run = {
        "machine_info": {
            "device": "A GPU 9000",
            "versions": {"torch": "1"},
            "ceilings": {"bf16": 1e12, "copy": 1e12},
            "smoke": smoke,
        },
        "datetime": "2026-01-02T03:04:05",
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "benchmarks": [{"fullname": name, "group": "g", "stats": stats, "extra_info": info}],
        "unmeasured": [{"name": n, "reason": "out of memory"} for n in unmeasured],
    }
    path.write_text(json.dumps(run))
    return path


def test_runs_are_merged_into_one_record_a_device(bench, tmp_path):
    record = bench("record").record
    record(run_file(tmp_path / "1.json", unmeasured=["b"]), tmp_path)
    record(run_file(tmp_path / "2.json", name="bench_model.py::c"), tmp_path)
    path = record(run_file(tmp_path / "3.json", median=2e-3), tmp_path, commit="abc")
    assert path.name == "a-gpu-9000.json"
    entries = json.loads(path.read_text())
    assert set(entries) == {"bench_kernels.py::bench_kernel[a]", "b", "bench_model.py::c", "ceilings"}
    assert entries["b"]["unmeasured"] == "out of memory"
    assert entries["bench_kernels.py::bench_kernel[a]"]["median_s"] == 2e-3
    assert entries["bench_kernels.py::bench_kernel[a]"]["commit"] == "abc"
    assert entries["bench_model.py::c"]["commit"] == "0123456789ab+"
    assert all(entry["date"] == "2026-01-02" for entry in entries.values())


def test_tiny_sizes_do_not_join_the_results(bench, tmp_path):
    record = bench("record")
    with pytest.raises(ValueError, match="--smoke"):
        record.record(run_file(tmp_path / "1.json", smoke=True))


def test_every_commit_keeps_its_figures(bench, tmp_path, capsys):
    record, history = bench("record"), bench("history")
    name, rival = "bench_kernels.py::bench_kernel[ours]", "bench_kernels.py::bench_kernel[plain]"

    def measured(commit, day, seconds):
        path = run_file(tmp_path / "run.json", name=name, median=seconds)
        run = json.loads(path.read_text()) | {"datetime": f"2026-01-{day}T03:04:05"}
        run["benchmarks"][0]["extra_info"]["against"] = rival
        run["benchmarks"].append(run["benchmarks"][0] | {"fullname": rival, "extra_info": {}})
        run["benchmarks"][1]["stats"] = {"median": 1.0, "iqr": 0.0, "rounds": 5}
        path.write_text(json.dumps(run))
        return record.record(path, tmp_path, commit)

    # Named so that their files sort the other way round.
    measured("zzz", "02", 0.5)
    path = measured("aaa", "03", 0.1)
    assert json.loads(path.read_text())[name]["ratio"] == 10.0
    history.main(["--folder", str(tmp_path / "history"), "--output", str(tmp_path)])
    text = (tmp_path / "a-gpu-9000-history.md").read_text()
    assert "| | 2026-01-02 03:04<br>`zzz` | 2026-01-03 03:04<br>`aaa` |" in text
    assert "| bench_kernel[ours] | 2.00 | 10.00 |" in text
    assert text in capsys.readouterr().out
    assert (tmp_path / "a-gpu-9000-history.png").stat().st_size > 1000

    measured("aaa", "03", 0.2)  # the same commit measured again
    text = history.render(tmp_path / "history" / "a-gpu-9000", tmp_path)
    assert "| bench_kernel[ours] | 2.00 | 5.00 |" in text

    record.forget(path, [rival])
    assert set(json.loads(path.read_text())) == {"ceilings", name}
    with pytest.raises(ValueError, match="does not hold"):
        record.forget(path, [rival])


def test_a_device_without_history_is_named(bench, tmp_path):
    (tmp_path / "a-gpu").mkdir()
    with pytest.raises(ValueError, match=r"no history of 'a-cpu'; recorded devices: a-gpu"):
        bench("history").load(tmp_path / "a-cpu")


def test_roofline_of_a_record(bench, tmp_path, capsys):
    path = bench("record").record(run_file(tmp_path / "run.json"), tmp_path)
    bench("roofline").main([str(path), "--output", str(tmp_path)])
    assert (
        "| edge_attention | forward | 256 | bf16 | 3.0 | 1000 | 1.0 | 2 | memory | 50% |"
        in capsys.readouterr().out
    )
    assert (tmp_path / "a-gpu-9000-roofline.png").stat().st_size > 1000


def test_predicted_kernels_stay_under_the_roofs(bench):
    roofline = bench("roofline")
    points = roofline.predicted_points(roofline.DATASHEET)
    assert {p.operation for p in points} == set(roofline.OPERATIONS)
    for point in points:
        assert point.tflops <= roofline.DATASHEET["bf16"] / 1e12 * (1 + 1e-9)
        assert point.gbytes_per_s <= roofline.DATASHEET["copy"] / 1e9 * (1 + 1e-9)


def test_a_record_without_kernels_is_refused(bench, tmp_path, capsys):
    (tmp_path / "record.json").write_text("{}")
    with pytest.raises(SystemExit):
        bench("roofline").main([str(tmp_path / "record.json")])
    assert "bench_kernels.py" in capsys.readouterr().err
