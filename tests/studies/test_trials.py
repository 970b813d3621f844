import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mgt_fast.data import CrystalDataset
from mgt_fast.predictions import read_predictions
from mgt_fast.studies import trials as module
from mgt_fast.studies.trials import Pretraining, Trial, TrialResult, run_trials, seen_structures
from mgt_fast.train.batches import select_parts
from mgt_fast.train.config import ConfigError, FinetuneConfig, PretrainConfig, load_config
from mgt_fast.train.interrupt import RunStoppedError

TINY = [
    *("model.channels=8", "model.num_scalars=4", "model.num_vectors=2", "model.num_blocks=1"),
    *("data.limit=8", "data.max_neighbors=6", "optim.epochs=2", "optim.warmup_epochs=0.5"),
    *("optim.batch_size=4", "optim.lr=1e-3", "device=cpu", "threads=1"),
]


def study(*changes, seeds=(0, 1)):
    """Trials of two seeds from scratch and one from a pretraining."""
    found = []
    for seed in seeds:
        settings = load_config(FinetuneConfig, None, [*TINY, f"seed={seed}", *changes])
        found.append(Trial(f"scratch-{seed}", settings, None, {"seed": seed}))
    own = Pretraining("both", load_config(PretrainConfig, None, TINY))
    return [*found, Trial("own-0", found[0].config, own, {"seed": 0})]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    said = io.StringIO()
    results = run_trials(folder, study(), Console(file=said, width=200))
    return folder, results, said.getvalue()


def copied(done, tmp_path):
    return Path(shutil.copytree(done[0], tmp_path / "study"))


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_trials_leave_run_folders_and_say_their_errors(done):
    folder, results, said = done
    assert sorted(path.name for path in (folder / "trials").iterdir()) == ["own-0", "scratch-0", "scratch-1"]
    assert "trial 2 of 3, scratch-1: test MAE" in said
    assert "pretraining both ..." in said
    for found in results:
        table = read_predictions(found.folder / "predictions.csv")
        errors = np.abs(table.error[table.part == "test"])
        assert len(found.errors) == 8
        assert found.mae == pytest.approx(errors.mean())
        assert found.mae == pytest.approx(np.mean(list(found.errors.values())))
        assert found.seconds_per_epoch > 0
    assert results[0].mae != results[2].mae  # the pretraining did something


def test_a_study_that_is_done_is_only_read(done):
    folder, results, _ = done
    before, said = stamps(folder), io.StringIO()
    again = run_trials(folder, study(), Console(file=said, width=200))
    assert stamps(folder) == before
    assert [found.mae for found in again] == [found.mae for found in results]
    assert said.getvalue().count("as found") == 3


def test_a_study_may_be_named_by_another_path(done, monkeypatch):
    folder, results, _ = done
    monkeypatch.chdir(folder.parent)
    before = stamps(folder)
    again = run_trials(folder.name, study(), Console(quiet=True))
    assert stamps(folder) == before
    assert [found.mae for found in again] == [found.mae for found in results]


def test_a_missing_trial_is_run_and_the_others_stay(done, tmp_path):
    folder = copied(done, tmp_path)
    shutil.rmtree(folder / "trials" / "own-0")
    before = stamps(folder)
    again = run_trials(folder, study(), Console(quiet=True))
    assert {path: stamp for path, stamp in stamps(folder).items() if path in before} == before
    assert again[2].mae == done[1][2].mae


def test_a_stopped_trial_goes_on_where_it_was(done, tmp_path, monkeypatch):
    folder = tmp_path / "study"
    finetune = module.finetune

    def stopped(config, place, *arguments, **options):
        if place.name == "scratch-1":
            finetune(config, place, *arguments, **options)
            (place / "results.json").unlink()
            (place / "predictions.csv").unlink()
            raise RunStoppedError("stopped after step 4", 2)
        return finetune(config, place, *arguments, **options)

    monkeypatch.setattr(module, "finetune", stopped)
    with pytest.raises(RunStoppedError, match="stopped in trial 2 of 3, scratch-1") as caught:
        run_trials(folder, study(), Console(quiet=True))
    assert caught.value.signal == 2
    monkeypatch.setattr(module, "finetune", finetune)
    results = run_trials(folder, study(), Console(quiet=True))
    assert [found.mae for found in results] == [found.mae for found in done[1]]


def test_a_trial_of_other_settings_is_refused(done):
    folder, said = done[0], io.StringIO()
    with pytest.raises(ConfigError, match=r"optim\.lr = 0\.002, the run has 0\.001"):
        run_trials(folder, study("optim.lr=2e-3"), Console(file=said, width=200))
    assert said.getvalue() == "trial 1 of 3, scratch-0: failed\n"


def test_a_trial_of_other_crystals_is_refused(done, monkeypatch):
    folder, _, _ = done
    monkeypatch.setattr(module, "manifest_digest", lambda dataset: "another")
    with pytest.raises(ConfigError, match="now it is another; put that one back, or give the study another"):
        run_trials(folder, study(), Console(quiet=True))


def test_a_study_refuses_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="runs on one process, and there are 2; start it without torchrun"):
        run_trials(tmp_path, study(), Console(quiet=True))
    assert not list(tmp_path.iterdir())


def test_runs_need_places_of_their_own(tmp_path):
    first = study()[0]
    with pytest.raises(ValueError, match="two trials are called 'scratch-0'"):
        run_trials(tmp_path, [first, first], Console(quiet=True))
    starts = [load_config(PretrainConfig, None, [*TINY, f"seed={seed}"]) for seed in (0, 1)]
    trials = [Trial(f"t{i}", first.config, Pretraining("both", start)) for i, start in enumerate(starts)]
    with pytest.raises(ValueError, match="two pretrainings are called 'both'"):
        run_trials(tmp_path, trials, Console(quiet=True))


@pytest.mark.parametrize(("target", "seen"), [("band_gap", True), ("formation_energy_per_atom", False)])
def test_test_structures_that_a_pretraining_saw_are_warned_of(tmp_path, target, seen):
    """Parts drawn at random agree only if every crystal has the target; those of a file always do."""
    dataset = CrystalDataset.open()
    known = ~np.isnan(dataset.targets[target])
    names = [dataset.ids[i] for i in np.flatnonzero(known)[:200]]
    halves = {"train": names[:100], "val": names[100:150], "test": names[150:]}
    (tmp_path / "split.json").write_text(json.dumps(halves))
    parts = "data.fractions=[0.8,0.1,0.1]" if seen else f"data.split_file={tmp_path / 'split.json'}"
    tuning = load_config(FinetuneConfig, None, [f"data.target={target}", parts, "seed=0"])
    before = load_config(PretrainConfig, None, [parts, "seed=0"])
    tested = select_parts(dataset, tuning.data, 0, known)["test"]

    class Result(TrialResult):
        errors = dict.fromkeys([dataset.ids[i] for i in tested], 0.1)

    found = seen_structures([Result(Trial("own-0", tuning, Pretraining("both", before)), tmp_path)])
    assert found == [] if not seen else "has learnt, without labels, from 74 of the 105 crystals" in found[0]
