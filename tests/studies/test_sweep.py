import csv
import json
import shutil

import numpy as np
import pytest
from study_runs import study

from mgt_fast.checkpoint import load_checkpoint
from mgt_fast.data import CrystalDataset
from mgt_fast.graph import build_graph
from mgt_fast.studies.sweep import Axis, parse_axis
from mgt_fast.train.batches import select_parts
from mgt_fast.train.config import ConfigError, FinetuneConfig, load_config
from mgt_fast.train.runlog import read_metrics

GRID = ("--over", "data.max_neighbors=6,9", "--over", "data.shell_tolerance=1.0e-4,0.3")


NAME = "max_neighbors=9-shell_tolerance=0.3-seed0"


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    return folder, study("sweep", folder, *GRID, "--seeds", "0,1")


def test_a_grid_has_every_pair_of_values(grid):
    folder, result = grid
    with (folder / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    pairs = {(row["data.max_neighbors"], row["data.shell_tolerance"]) for row in rows}
    assert pairs == {(k, t) for k in ("6", "9") for t in ("0.0001", "0.3")}
    assert len(rows) == 8
    meta = load_checkpoint(folder / "trials" / "max_neighbors=9-shell_tolerance=0.3-seed1")[1]
    assert (meta.max_neighbors, meta.shell_tolerance) == (9, 0.3)
    assert not (folder / "pretraining").exists()
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "sweep.md").read_text()
    assert "against data.max_neighbors = 6, data.shell_tolerance = 0.0001" in text
    assert result.output.count("lower than with") + result.output.count("higher than with") == 3


def test_throughput_is_what_the_run_took_for_its_edges(grid):
    folder, _ = grid
    dataset = CrystalDataset.open()
    known = ~np.isnan(dataset.targets["formation_energy_per_atom"])
    config = load_config(FinetuneConfig, folder / "trials" / NAME / "config.yaml")
    chosen = select_parts(dataset, config.data, 0, known)["train"]
    assert len(chosen) == 8
    graph = build_graph(dataset.gather(chosen), 9, shell_tolerance=0.3)
    seconds = read_metrics(folder / "trials" / NAME)[0]["seconds"]
    records = json.loads((folder / "sweep.json").read_text())["records"]
    (record,) = (
        one
        for one in records
        if (one["data.max_neighbors"], one["data.shell_tolerance"], one["seed"]) == (9, 0.3, 0)
    )
    assert record["edges_per_crystal"] == graph.num_edges / 8
    assert record["crystals_per_second"] == pytest.approx(8 / seconds)
    assert record["edges_per_second"] == pytest.approx(graph.num_edges / seconds)


def test_settings_of_the_pretraining_need_one_each(tmp_path):
    over = "pretraining.noise_std=0.05,0.2"
    study("sweep", tmp_path, "--over", over, "--seeds", 0)
    configs = sorted(path.read_text() for path in (tmp_path / "pretraining").glob("*/config.yaml"))
    assert len(configs) == 2
    assert ["noise_std: 0.05" in configs[0], "noise_std: 0.2" in configs[1]] == [True, True]
    shutil.rmtree(tmp_path / "trials" / "noise_std=0.2-seed0")
    again = study("sweep", tmp_path, "--over", "pretraining.noise_std=0.2,0.05", "--seeds", 0)
    assert again.output.count("as found") == 1
    assert len(list((tmp_path / "pretraining").iterdir())) == 2  # whatever the order of the values
    assert "only seed" in again.output


def test_axes():
    assert parse_axis("optim.lr=1.0e-3,2e-3").values == (1e-3, 2e-3)  # the second is text in YAML
    assert parse_axis("data.compat=null,comformer") == Axis("data.compat", (None, "comformer"))
    assert Axis("pretraining.noise_std", (1, 2)).override(1) == "pretraining.noise_std=1"
    assert Axis("pretraining.optim.lr", (1, 2)).override(1) == "optim.lr=1"
    assert Axis("data.compat", (None, "comformer")).override(None) == "data.compat=null"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.lr", "expected a key and two different values"),
        ("optim.lr=1", "expected a key and two different values"),
        ("optim.lr=1,1", "expected a key and two different values"),
        ("optim.lr=1,]", "not valid YAML"),
        ("seed=1,2", "--over seed: use --seeds"),
        ("data.limit=10,20", "data.limit: errors on other crystals .* transfer --sizes"),
    ],
)
def test_what_is_no_axis(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_axis(text)


def test_unknown_keys_are_told_before_the_work(tmp_path):
    result = study("sweep", tmp_path / "new", "--over", "data.max_neighbours=6,9", status=1)
    assert "did you mean data.max_neighbors" in result.stderr
    result = study("sweep", tmp_path / "new", "--over", "optim.lr=1.0,-1.0", status=1)
    assert "optim.lr = -1.0" in result.stderr
    assert not (tmp_path / "new").exists()
