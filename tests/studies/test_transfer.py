import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from study_runs import study

from mgt_fast.data import CrystalDataset
from mgt_fast.studies.mismatch import PretrainingLosses, mismatch_warnings, speeds
from mgt_fast.train.config import FinetuneConfig, load_config
from mgt_fast.train.runlog import read_metrics


@pytest.fixture(scope="module")
def transferred(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transfer")
    return folder, study("transfer", folder, "--sizes", "4,all", "--seeds", "0,1")


def config_of(folder, trial):
    return load_config(FinetuneConfig, folder / "trials" / trial / "config.yaml")


def parts_of(folder, trial):
    return json.loads(config_of(folder, trial).data.split_file.read_text())


def test_both_arms_learn_from_the_same_nested_crystals(transferred):
    folder, _ = transferred
    for seed in (0, 1):
        small, large = (parts_of(folder, f"scratch-n{size}-seed{seed}") for size in (4, 8))
        assert parts_of(folder, f"pretrained-n4-seed{seed}") == small
        assert (len(small["train"]), len(large["train"])) == (4, 8)
        assert set(small["train"]) < set(large["train"])
        assert (small["val"], small["test"]) == (large["val"], large["test"])
        sizes = json.loads((folder / "trials" / f"scratch-n4-seed{seed}" / "results.json").read_text())
        assert sizes["test"]["model"]["count"] == len(small["test"]) == 8
    first, second = (parts_of(folder, f"scratch-n4-seed{seed}")["train"] for seed in (0, 1))
    assert first != second
    dataset = CrystalDataset.open()
    assert set(first) <= {dataset.ids[i] for i in dataset.part("train")}


def test_only_the_start_differs(transferred):
    folder, _ = transferred
    scratch, pretrained = (config_of(folder, f"{arm}-n4-seed1") for arm in ("scratch", "pretrained"))
    assert pretrained.start == folder / "pretraining" / "seed1"
    assert scratch == pretrained.model_copy(update={"start": None})


def test_the_report_has_curves_losses_and_the_way(transferred):
    folder, result = transferred
    found = json.loads((folder / "transfer.json").read_text())
    assert [row["size"] for row in found["details"]["sizes"]] == [4, 8]
    for row in found["details"]["sizes"]:
        maes = {
            arm: [r["mae"] for r in found["records"] if (r["arm"], r["size"]) == (arm, row["size"])]
            for arm in ("scratch", "pretrained")
        }
        assert row["scratch"] == pytest.approx(np.mean(maes["scratch"]))
        assert row["difference"] == pytest.approx(np.mean(np.subtract(maes["pretrained"], maes["scratch"])))
    assert len(found["details"]["pretraining_losses"]) == 2
    for one in found["details"]["pretraining_losses"]:
        assert one["crystals"] == 8
        assert set(one["source"]) == {"contrastive", "se3_denoising", "so3_denoising"}
        assert all(math.isfinite(value) for value in (*one["source"].values(), *one["target"].values()))
    course = found["details"]["course"]
    assert {(row["size"], row["epoch"]) for row in course} == {(4, 1), (8, 1)}
    values = [read_metrics(folder / "trials" / f"pretrained-n8-seed{seed}")[0]["val_mae"] for seed in (0, 1)]
    assert course[1]["pretrained"] == pytest.approx(np.mean(values))
    assert set(found["environment"]["datasets"]) == {"source", "target"}
    assert "not resolved" in result.output
    assert (folder / "transfer.png").read_bytes().startswith(b"\x89PNG")


def test_losses_on_the_source_are_those_of_the_pretraining(transferred):
    folder, _ = transferred
    found = json.loads((folder / "transfer.json").read_text())["details"]["pretraining_losses"][0]
    (record,) = read_metrics(folder / "pretraining" / "seed0")
    # The same eight crystals in one batch, with the noise of their place in the dataset.
    assert found["source"]["contrastive"] == pytest.approx(record["val_contrastive"], rel=1e-4)
    assert found["chance"] == {"contrastive": pytest.approx(math.log(2 * 8 - 1))}
    assert found["source"]["se3_denoising"] == pytest.approx(record["val_se3_denoising"], rel=1e-4)


def test_the_same_command_goes_on_and_a_checkpoint_stands_in(transferred, tmp_path):
    folder, _ = transferred
    start = folder / "pretraining" / "seed0"
    arguments = ("--from", start, "--sizes", "4", "--seeds", "0", "--steps", 3)
    study("transfer", tmp_path, *arguments)
    assert study("transfer", tmp_path, *arguments).output.count("as found") == 2
    config = config_of(tmp_path, "pretrained-n4-seed0")
    assert (config.start, config.optim.epochs) == (start, 3)
    details = json.loads((tmp_path / "transfer.json").read_text())["details"]
    assert details["pretraining_losses"][0]["name"] == "seed0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "4,9"], "sizes = 4, 9: expected different numbers from 2 to 8"),
        (["--sizes", "8,all"], "sizes = 8, all: expected different"),
        (["--sizes", "few"], "sizes = few: expected different"),
        (["--seeds", ""], "seeds = nothing"),
        (["--source", "a", "--from", "b"], "--source and --from exclude each other"),
    ],
)
def test_faults_are_told_before_the_work(arguments, message, tmp_path):
    assert message in study("transfer", tmp_path / "new", *arguments, status=1).stderr
    assert not (tmp_path / "new").exists()


def trial(*val_mae):
    return SimpleNamespace(metrics=[{"val_mae": value} for value in val_mae])


def test_a_slow_start_is_warned_of_and_a_quick_one_is_not():
    slow = [trial(0.9 + 0.01 * i, *[0.5] * 8, 0.2 + 0.001 * i) for i in range(4)]
    quick = [trial(0.5 + 0.012 * i, *[0.5] * 8, 0.2 + 0.002 * (i % 2)) for i in range(4)]
    found = speeds([(100, slow, quick)])
    assert [row.epoch for row in found] == [1, 10]
    (warning,) = mismatch_warnings([], found, "eV")
    assert "with 100 crystals fine-tuning is behind training from scratch in epoch 1" in warning
    assert "eV (n = 4 seeds" in warning
    assert mismatch_warnings([], speeds([(100, quick, slow)]), "eV") == []
    assert mismatch_warnings([], speeds([(100, slow[:1], quick[:1])]), "eV") == []  # one seed shows nothing


def test_a_pretraining_that_has_learnt_nothing_is_warned_of():
    def losses(contrastive):
        source = {"contrastive": contrastive, "se3_denoising": 1.0}
        return [PretrainingLosses("seed0", 40, source, source, {"contrastive": 4.0})]

    (warning,) = mismatch_warnings(losses(3.9), [], None)
    assert "its contrastive loss on held-out crystals of the source is 3.9, where 4 is chance" in warning
    assert mismatch_warnings(losses(3.0), [], None) == []


def test_structures_unlike_those_learnt_from_are_warned_of():
    def losses(factor):
        source = {"contrastive": 2.0, "se3_denoising": 1.0, "so3_denoising": 1.0}
        target = source | {"se3_denoising": factor}
        return [PretrainingLosses(f"seed{i}", 40, source, target, {}) for i in range(2)]

    (warning,) = mismatch_warnings(losses(1.5), [], None)
    assert "the se3 denoising loss is 1 on held-out crystals of the source and 1.5 on the target" in warning
    assert "add structures like them to the source" in warning
    assert mismatch_warnings(losses(1.2), [], None) == []
    assert mismatch_warnings([losses(1.5)[0], losses(1.2)[0]], [], None) == []
