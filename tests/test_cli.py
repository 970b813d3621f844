import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mgt_fast.checkpoint import load_checkpoint
from mgt_fast.cli import app
from mgt_fast.data import CrystalDataset
from mgt_fast.demo import write_cif
from mgt_fast.model import MGT
from mgt_fast.train.runlog import read_metrics

TINY = [
    f"--set={setting}"
    for setting in (
        "model.channels=16",
        "model.num_scalars=8",
        "model.num_vectors=2",
        "model.num_blocks=1",
        "data.limit=14",
        "data.max_neighbors=8",
        "optim.epochs=2",
        "optim.warmup_epochs=0.5",
        "optim.batch_size=6",
        "optim.lr=1e-3",
        "threads=1",
    )
]
TARGET = "formation_energy_per_atom"
PREDICTION, REFERENCE = f"prediction {TARGET} [eV/atom]", f"reference {TARGET} [eV/atom]"


def invoke(*arguments, status=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Pretrain and fine-tune a tiny network on some of the bundled crystals, through the command line."""
    folder = tmp_path_factory.mktemp("runs")
    pretrained = invoke("pretrain", *TINY, "--output", folder / "pretrain")
    tuned = invoke(
        "finetune",
        "--from",
        folder / "pretrain",
        *TINY[4:],
        "-s",
        f"data.target={TARGET}",
        "-o",
        folder / "finetune",
    )
    return folder, pretrained, tuned


@pytest.fixture(scope="module")
def dataset():
    return CrystalDataset.open()


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_pretrain_reports_its_losses_and_parts(runs):
    folder, pretrained, _ = runs
    assert "pretraining on 28 crystals (train 14, (no part) 14)" in pretrained.output
    assert "losses reported on 14 of 'val'" in pretrained.output
    records = read_metrics(folder / "pretrain")
    assert [record["epoch"] for record in records] == [1, 2]
    parts = ("contrastive", "se3_denoising", "so3_denoising")
    for record in records:
        for part in ("train", "val"):
            assert all(np.isfinite(record[f"{part}_{name}"]) for name in ("loss", *parts))
    # Six crystals a batch, twelve embeddings: guessing costs log(11).
    assert records[0]["train_contrastive"] == pytest.approx(np.log(11), rel=0.5)


def test_finetune_names_new_heads_and_takes_the_checkpoints_sizes(runs):
    folder, _, tuned = runs
    assert "newly initialised: mixture_of_experts; not used: se3_angle_layer, so3_edge_layer" in tuned.output
    assert "train 14, val 14, test 14 crystals" in tuned.output
    state, meta = load_checkpoint(folder / "finetune")
    assert (meta.model.channels, meta.max_neighbors, meta.target, meta.unit) == (16, 8, TARGET, "eV/atom")
    assert state["se3_graph_encoder.atom_embedding.weight"].shape == (16, 92)


def test_finetune_scores_every_sample_of_val_and_test(runs, dataset):
    folder, _, _ = runs
    rows = rows_of(folder / "finetune" / "predictions.csv")
    assert [sum(row["part"] == part for row in rows) for part in ("val", "test")] == [14, 14]
    results = json.loads((folder / "finetune" / "results.json").read_text())
    targets = dict(zip(dataset.ids, dataset.targets[TARGET], strict=True))
    for part in ("val", "test"):
        chosen = [row for row in rows if row["part"] == part]
        assert [float(row[REFERENCE]) for row in chosen] == [targets[row["id"]] for row in chosen]
        difference = [float(row[PREDICTION]) - targets[row["id"]] for row in chosen]
        assert results[part]["model"]["count"] == 14
        assert results[part]["model"]["mae"] == pytest.approx(np.abs(difference).mean())
        assert results[part]["mean"]["mae"] > 0
        assert results[part]["median"]["mae"] > 0
    best = results["best_epoch"]
    assert results["val"]["model"]["mae"] == pytest.approx(
        read_metrics(folder / "finetune")[best - 1]["val_mae"], rel=1e-5
    )
    assert all(
        float(row["se3_contribution"]) + float(row["so3_contribution"]) == pytest.approx(1) for row in rows
    )


def test_evaluate_scores_the_whole_part(runs, dataset, tmp_path):
    folder, _, _ = runs
    result = invoke("evaluate", "-m", folder / "finetune", "--split", "test", "-o", tmp_path / "p.parquet")
    count = int(((dataset.split == "test") & ~np.isnan(dataset.targets[TARGET])).sum())
    assert f"over {count} crystals" in result.output
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "p.parquet")
    mae = np.abs(table[REFERENCE].to_numpy() - table[PREDICTION].to_numpy()).mean()
    assert f"MAE {mae:.6g} eV/atom" in result.output


def test_predictions_do_not_depend_on_the_batch(runs, dataset, tmp_path):
    folder, _, _ = runs
    for size in (5, 64):
        invoke("evaluate", "-m", folder / "finetune", "--batch-size", size, "-o", tmp_path / f"{size}.csv")
    small, large = rows_of(tmp_path / "5.csv"), rows_of(tmp_path / "64.csv")
    assert [row["id"] for row in small] == [row["id"] for row in large]
    np.testing.assert_allclose(
        [float(row[PREDICTION]) for row in small],
        [float(row[PREDICTION]) for row in large],
        rtol=1e-4,
        atol=1e-4,
    )


def structures(dataset, indices):
    from pymatgen.core import Structure

    batch = dataset.gather(indices)
    return [
        Structure(
            batch.cell[b].numpy(),
            batch.numbers[start:stop].tolist(),
            batch.frac_coords[start:stop].numpy(),
        )
        for b, (start, stop) in enumerate(zip(batch.batch_ptr[:-1], batch.batch_ptr[1:], strict=True))
    ]


def test_python_call_takes_structures_and_atoms_alike(runs, dataset):
    folder, _, _ = runs
    indices = np.flatnonzero(dataset.split == "test")[:5]
    crystals = structures(dataset, indices)
    model = MGT.load(folder / "finetune")
    from_structures = model.predict(crystals)
    from_atoms = model.predict([c.to_ase_atoms() for c in crystals], ids="abcde", batch_size=2)
    assert from_atoms.ids == tuple("abcde")
    assert from_structures.ids == ("0", "1", "2", "3", "4")
    assert from_structures.label == f"{TARGET} [eV/atom]"
    np.testing.assert_allclose(from_atoms.prediction, from_structures.prediction, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(from_structures.contributions.sum(1), 1)
    expected = {row["id"]: float(row[PREDICTION]) for row in rows_of(folder / "finetune" / "predictions.csv")}
    for index, value in zip(indices, from_structures.prediction, strict=True):
        if dataset.ids[index] in expected:
            assert value == pytest.approx(expected[dataset.ids[index]], abs=1e-3)


def test_predict_reads_cif_folders_and_lists_what_it_cannot_read(runs, dataset, tmp_path):
    folder, _, _ = runs
    indices = np.flatnonzero(dataset.split == "test")[:3]
    cifs = tmp_path / "cifs"
    cifs.mkdir()
    for index in indices:
        write_cif(cifs / f"{dataset.ids[index]}.cif", dataset.gather([index]))
    (cifs / "broken.cif").write_text("data_broken\n_cell_length_a nonsense\n")
    (cifs / "readme.txt").write_text("no crystal")
    result = invoke("predict", cifs, "-m", folder / "finetune", "-o", tmp_path / "out.csv", "-j", 1)
    rows = rows_of(tmp_path / "out.csv")
    assert list(rows[0]) == ["id", PREDICTION, "se3_contribution", "so3_contribution"]
    assert sorted(row["id"] for row in rows) == sorted(dataset.ids[i] for i in indices)
    expected = MGT.load(folder / "finetune").predict(structures(dataset, indices)).prediction
    found = {row["id"]: float(row[PREDICTION]) for row in rows}
    np.testing.assert_allclose([found[dataset.ids[i]] for i in indices], expected, rtol=1e-3, atol=1e-3)
    assert result.stderr.splitlines() == [
        f"note: 1 files without crystals were left out: {cifs / 'readme.txt'}",
        f"1 of 4 crystals not predicted; see {tmp_path / 'out.rejects.csv'}",
    ]
    rejects = (tmp_path / "out.rejects.csv").read_text()
    assert "broken.cif" in rejects


def test_predict_fails_if_nothing_could_be_predicted(runs, tmp_path):
    (tmp_path / "broken.cif").write_text("data_broken\n")
    folder, _, _ = runs
    invoke(
        "predict",
        tmp_path / "broken.cif",
        "-m",
        folder / "finetune",
        "-o",
        tmp_path / "out.csv",
        "-j",
        1,
        status=1,
    )
    assert not (tmp_path / "out.csv").exists()
    assert "broken.cif" in (tmp_path / "out.rejects.csv").read_text()


def test_predict_takes_a_dataset(runs, dataset, tmp_path):
    folder, _, _ = runs
    invoke(
        "predict", dataset.path, "-m", folder / "finetune", "-o", tmp_path / "out.csv", "--batch-size", 512
    )
    assert [row["id"] for row in rows_of(tmp_path / "out.csv")] == list(dataset.ids)


def test_prepare_own_files(runs, dataset, tmp_path):
    folder, _, _ = runs
    cifs = tmp_path / "cifs"
    cifs.mkdir()
    indices = np.flatnonzero(~np.isnan(dataset.targets[TARGET]))[:4]
    for index in indices:
        write_cif(cifs / f"{dataset.ids[index]}.cif", dataset.gather([index]))
    (cifs / "broken.cif").write_text("data_broken\n")
    rows = [f"{dataset.ids[i]},{dataset.targets[TARGET][i]}" for i in indices] + ["broken,1.0"]
    (cifs / "id_prop.csv").write_text("\n".join(rows) + "\n")
    arguments = ["prepare", cifs, "-o", tmp_path / "own", "-j", 1, "-t", "target=energy"]
    result = invoke(*arguments, "-u", "energy=eV/atom")
    assert "4 crystals stored of 5 read, 1 rejected" in result.stdout
    made = CrystalDataset.open(tmp_path / "own")
    assert made.target_units == {"energy": "eV/atom"}
    result = invoke(
        "evaluate", "-m", folder / "finetune", "-d", tmp_path / "own", "--target", "energy", "--split", "all"
    )
    assert "over 4 crystals" in result.stdout
    assert "exists already" in invoke(*arguments, status=1).stderr
    invoke(*arguments, "-u", "energy=kcal/mol", "--overwrite")
    arguments = ["evaluate", "-m", folder / "finetune", "-d", tmp_path / "own", "--target", "energy"]
    assert "predicts eV/atom, but the dataset's energy is in kcal/mol" in invoke(*arguments, status=1).stderr


def test_prepare_fails_if_nothing_could_be_stored(tmp_path):
    (tmp_path / "broken.cif").write_text("data_broken\n")
    result = invoke("prepare", tmp_path / "broken.cif", "-o", tmp_path / "own", "-j", 1, status=1)
    assert "no crystal was stored" in result.stderr
    assert "0 crystals stored of 1 read, 1 rejected" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "nothing.cif", "-o", "own"], "nothing.cif does not exist"),
        (["prepare", "x", "-o", "own", "-u", "eV"], "--unit eV: expected NAME=VALUE"),
        (["finetune", "--set", "data.target=gap"], "no target 'gap'; available: "),
        (["finetune", "--set", "optim.lrr=1"], "unknown key 'optim.lrr' (did you mean optim.lr"),
        (["finetune", "--config", "nothing.yaml"], "no configuration file 'nothing.yaml'"),
        (["finetune", "--from", "nothing.safetensors"], "no checkpoint nothing.safetensors"),
        (["finetune", "--set", "data.path=nothing"], "nothing is no dataset"),
        (["finetune", "--set", "data.fractions=[1, 0, 0]"], "part 'val' is empty"),
        (["finetune", "--set", "optim.epochs=3"], "warmup_epochs = 10 is longer than the run, epochs = 3"),
        (["finetune", "--set", "data.limit=1"], "training needs at least 2"),
        (["pretrain", "-s", "data.limit=1", "-s", "data.train=[train]"], "training needs at least 2"),
        (["finetune", "--set", "device=cpu", "--set", "backend=triton"], "Triton kernels need a CUDA device"),
        (
            ["pretrain", "--set", "data.held_out=validation"],
            "data.held_out = 'validation': Input should be 'train', 'val' or 'test'",
        ),
        (["evaluate", "-m", "nothing.safetensors"], "no checkpoint nothing.safetensors"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mgt_fast.kernels.launch.INTERPRETED", False)  # as on a user's machine
    result = invoke(*arguments, status=1)
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_and_a_contradicting_configuration(runs, tmp_path):
    folder, _, _ = runs
    result = invoke(
        "finetune", "--from", folder / "pretrain", "-s", "model.channels=32", "-o", tmp_path / "run", status=1
    )
    assert "model.channels = 32, but the checkpoint has 16" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "given", "kept"),
    [("max_neighbors", "9", "8"), ("compat", "comformer", "null"), ("shell_tolerance", "0.01", "0.0001")],
)
def test_a_checkpoint_and_contradicting_graphs(key, given, kept, runs, tmp_path):
    arguments = ["finetune", "--from", runs[0] / "pretrain", *TINY[4:], "-s", f"data.{key}={given}"]
    result = invoke(*arguments, "-o", tmp_path / "run", status=1)
    assert f"data.{key} = {given}, but the checkpoint has {kept}" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["foo", "part"])
def test_evaluate_lists_the_parts_there_are(split, runs):
    result = invoke("evaluate", "-m", runs[0] / "finetune", "--split", split, status=1)
    assert f"part {split!r} is empty" in result.stderr
    assert 'choose "", test, train, val, all' in result.stderr
    assert "fractions" not in result.stderr


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_table_that_cannot_be_written_is_found_out_first(command, runs, tmp_path, monkeypatch):
    def work(*_):
        raise AssertionError("the work began")

    monkeypatch.setattr("mgt_fast.checkpoint.load_checkpoint", work)
    arguments = [command, *(["x.cif"] if command == "predict" else []), "-m", runs[0] / "finetune", "-o"]
    assert "there is no folder" in invoke(*arguments, tmp_path / "none" / "out.csv", status=1).stderr
    assert "written as .csv or .parquet" in invoke(*arguments, tmp_path / "out.txt", status=1).stderr
    (tmp_path / "out.csv").write_text("precious")
    assert "pass --overwrite" in invoke(*arguments, tmp_path / "out.csv", status=1).stderr
    assert (tmp_path / "out.csv").read_text() == "precious"


def test_tables_are_replaced_when_asked(runs, dataset, tmp_path):
    write_cif(tmp_path / "a.cif", dataset.gather([0]))
    out = tmp_path / "out.csv"
    arguments = ["predict", tmp_path / "a.cif", "-m", runs[0] / "finetune", "-j", 1, "-o", out]
    (tmp_path / "out.rejects.csv").write_text("precious")
    assert "out.rejects.csv exists" in invoke(*arguments, status=1).stderr
    out.write_text("old")
    invoke(*arguments, "--overwrite")
    assert [row["id"] for row in rows_of(out)] == ["a"]
    assert not (tmp_path / "out.rejects.csv").exists()


def test_the_command_line_does_not_wait_for_torch():
    code = "import sys, mgt_fast.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("content", [b"", b"junk\n" * 20])
def test_import_of_a_damaged_checkpoint(content, tmp_path):
    (tmp_path / "junk.pt").write_bytes(content)
    result = invoke("import-checkpoint", tmp_path / "junk.pt", "-o", tmp_path / "x.safetensors", status=1)
    assert result.stderr.startswith(f"error: {tmp_path / 'junk.pt'} is damaged, or no file of plain tensors")


@pytest.mark.parametrize("target", ["target", "part"])  # "id" cannot be prepared
def test_tables_of_a_target_with_an_awkward_name(target, dataset, tmp_path):
    cifs = tmp_path / "cifs"
    cifs.mkdir()
    indices = np.flatnonzero(dataset.targets[TARGET] < 0)[:4]
    values = dict(zip("abcd", dataset.targets[TARGET][indices], strict=True))
    for name, index in zip(values, indices, strict=True):
        write_cif(cifs / f"{name}.cif", dataset.gather([index]))
    (cifs / "id_prop.csv").write_text("".join(f"{name},{value}\n" for name, value in values.items()))
    own, run, table = tmp_path / "own", tmp_path / "run", tmp_path / "e.csv"
    invoke("prepare", cifs, "-o", own, "-j", 1, "-t", f"target={target}")
    settings = [f"data.target={target}", "data.fractions=[0.5,0.25,0.25]", f"data.path={own}"]
    invoke("finetune", *TINY, *(f"--set={setting}" for setting in settings), "-o", run)
    invoke("evaluate", "-m", run, "-d", own, "-o", table, "--split", "all")
    for path, count in ((run / "predictions.csv", 2), (table, 4)):
        rows = rows_of(path)
        assert len(rows) == count
        for row in rows:
            reference, prediction = float(row[f"reference {target}"]), float(row[f"prediction {target}"])
            assert reference == pytest.approx(values[row["id"]])
            assert prediction != reference
    assert {row["part"] for row in rows_of(run / "predictions.csv")} == {"val", "test"}


def test_a_pretrained_network_does_not_predict(runs):
    folder, _, _ = runs
    result = invoke("evaluate", "-m", folder / "pretrain", "--target", TARGET, status=1)
    assert "predicts no property yet" in result.stderr


def test_a_second_run_does_not_replace_the_first_unasked(runs):
    folder, _, _ = runs
    before = (folder / "pretrain" / "metrics.jsonl").read_text()
    result = invoke("pretrain", *TINY, "-o", folder / "pretrain", status=1)
    assert "already holds config.yaml, environment.json, metrics.jsonl" in result.stderr
    assert (folder / "pretrain" / "metrics.jsonl").read_text() == before


def test_runs_are_reproducible(runs, tmp_path):
    folder, _, _ = runs
    invoke("pretrain", *TINY, "-o", tmp_path / "again")
    again, first = read_metrics(tmp_path / "again"), read_metrics(folder / "pretrain")
    assert [record["train_loss"] for record in again] == [record["train_loss"] for record in first]


def test_random_parts_are_drawn_again_for_evaluation(tmp_path):
    settings = [
        *TINY,
        "--set=data.fractions=[0.99, 0.005, 0.005]",
        "--set=data.limit=50",
        "--set=optim.epochs=1",
    ]
    invoke("finetune", *settings, "-o", tmp_path / "run")
    invoke("evaluate", "-m", tmp_path / "run", "-o", tmp_path / "test.csv")
    tested = [row["id"] for row in rows_of(tmp_path / "run" / "predictions.csv") if row["part"] == "test"]
    assert [row["id"] for row in rows_of(tmp_path / "test.csv")] == tested


def test_import_checkpoint(tmp_path):
    from mgt_fast.config import MGTConfig

    model = MGT(MGTConfig(channels=8, num_scalars=4, num_vectors=2, num_blocks=2, expert_hidden=4))
    state = model.state_dict() | {"se3_graph_encoder.edges_layer.0.lemb.weight": torch.zeros(3, 8)}
    torch.save({"state_dict": state}, tmp_path / "published.pt")
    output = tmp_path / "imported.safetensors"
    arguments = ["import-checkpoint", tmp_path / "published.pt", "-o", output]
    result = invoke(*arguments, "--target", "band_gap", "--unit", "eV", "--mean", 1.5, "--std", 0.5)
    assert "ignored 1 parameters" in result.output
    assert "se3_graph_encoder.edges_layer.0.lemb.weight" in result.output
    loaded = MGT.load(output)
    assert (loaded.meta.target, loaded.meta.unit, loaded.meta.compat) == ("band_gap", "eV", "comformer")
    assert (loaded.meta.target_mean, loaded.meta.target_std) == (1.5, 0.5)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert "pass --overwrite" in invoke(*arguments, status=1).stderr


def test_demo_leaves_its_pictures(tmp_path):
    result = invoke("demo", "-o", tmp_path / "demo", *TINY)
    for name in ("pretraining.png", "loss_curves.png", "parity.png", "router.png"):
        assert (tmp_path / "demo" / name).read_bytes().startswith(b"\x89PNG")
    assert "trivial MAE" in result.output
    assert len(rows_of(tmp_path / "demo" / "prediction.csv")) == 1
