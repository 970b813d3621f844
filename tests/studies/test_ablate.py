import csv
import json

import numpy as np
import pytest
from study_runs import study

from mgt_fast.checkpoint import load_checkpoint, load_model
from mgt_fast.studies.ablate import number_of_parameters


@pytest.fixture(scope="module")
def ablation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    return folder, study("ablate", folder, "--seeds", "0,1")


def test_every_variant_runs_with_every_start_and_seed(ablation):
    folder, _ = ablation
    with (folder / "ablate.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 2 * 2
    for row in rows:
        start = row["pretraining"]
        name = f"{row['variant']}-{start}-seed{row['seed']}"
        results = json.loads((folder / "trials" / name / "results.json").read_text())
        assert float(row["mae"]) == results["test"]["model"]["mae"]
    meta = load_checkpoint(folder / "trials" / "so3-own-seed1")[1]
    assert (meta.model.views, meta.model.fusion) == ("so3", "router")
    assert load_checkpoint(folder / "trials" / "concat-none-seed0")[1].model.fusion == "concat"


def test_each_choice_of_views_is_pretrained_once_a_seed(ablation):
    folder, _ = ablation
    names = sorted(path.name for path in (folder / "pretraining").iterdir())
    assert names == [f"{views}-seed{seed}" for views in ("both", "se3", "so3") for seed in (0, 1)]
    metrics = json.loads((folder / "pretraining" / "se3-seed0" / "metrics.jsonl").read_text())
    assert "val_se3_denoising" in metrics
    assert not any("so3" in name or "contrastive" in name for name in metrics)


def test_the_table_has_the_arms_with_their_spread(ablation):
    folder, result = ablation
    found = json.loads((folder / "ablate.json").read_text())
    arms = {(arm["pretraining"], arm["variant"]): arm for arm in found["details"]["arms"]}
    assert len(arms) == 8
    of = [
        record["mae"]
        for record in found["records"]
        if (record["variant"], record["pretraining"]) == ("concat", "own")
    ]
    arm = arms["own", "concatenation"]
    assert (arm["mean"], arm["sd"]) == pytest.approx((np.mean(of), np.std(of, ddof=1)))
    assert arm["count"] == 2
    network = load_model(folder / "trials" / "concat-own-seed0")
    assert arm["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    assert "verdict" not in arms["none", "router"]  # the baseline is not compared with itself
    assert len(found["claims"]) == 3 * 2 + 4
    assert all(claim.endswith(("not resolved", "better", "worse")) for claim in found["claims"])
    assert found["environment"]["datasets"]["target"]["crystals"] > 1000
    assert (folder / "ablate.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "ablate.md").read_text()
    assert "Holm" in text
    assert "| own | SO(3) only |" in text
    assert "not resolved" in result.output


def test_the_same_command_goes_on(ablation):
    folder, _ = ablation
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/*") if path.is_file()}
    result = study("ablate", folder, "--seeds", "0,1")
    assert result.output.count("as found") == 16
    assert {path: path.stat().st_mtime_ns for path in before} == before
    stderr = study("ablate", folder, "--seeds", "0,1", changes=["optim.lr=1e-2"], status=1).stderr
    assert "optim.lr = 0.01, the run has 0.001" in stderr


def test_a_checkpoint_as_start(ablation, tmp_path):
    folder, _ = ablation
    start = folder / "pretraining" / "both-seed0"
    result = study(
        "ablate", tmp_path, "--seeds", 3, "--pretraining", f"none,{start}", "--variants", "se3,router"
    )
    assert "for the only seed: not resolved; run more seeds" in result.output
    settings = (tmp_path / "trials" / "se3-both-seed0-seed3" / "config.yaml").read_text()
    assert f"start: {start}" in settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0,0"], "seeds = 0, 0: name each once"),
        (["--seeds", "a"], "--seeds a: expected whole numbers"),
        (["--variants", "se3,moe"], "no variant moe; choose of se3, so3, concat, router"),
        (["--pretraining", ""], "pretraining = nothing: name each once, one at least"),
        (
            ["--pretraining-set", "model.channels=4"],
            "model.channels = 4 for pretraining and 8 for fine-tuning",
        ),
    ],
)
def test_faults_are_told_before_the_work(arguments, message, tmp_path):
    assert message in study("ablate", tmp_path / "new", *arguments, status=1).stderr
    assert not (tmp_path / "new").exists()


def test_parameters_are_those_of_the_network(ablation):
    meta = load_checkpoint(ablation[0] / "trials" / "router-none-seed0")[1]
    state = load_model(ablation[0] / "trials" / "router-none-seed0").parameters()
    assert number_of_parameters(meta.model) == sum(parameter.numel() for parameter in state)
