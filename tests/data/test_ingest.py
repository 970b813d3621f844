"""What `prepare` does with records: every one is stored or listed, whatever is wrong with it."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from crystals import prototype_structures
from culprits import Culprit, lost_over_all_of
from pymatgen.core import Structure
from rich.console import Console

from mgt_fast import CrystalBatch, build_graph
from mgt_fast.data import CrystalDataset, DatasetError, PrepareError, prepare
from mgt_fast.data.ingest import REJECTS
from mgt_fast.data.parse import ParseOptions, parse_all, parse_chunk
from mgt_fast.data.readers.base import Arrays, RawRecord
from mgt_fast.data.workers import Limits, LostError

CELL = [[4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 4.0]]


def item(name="x", *, z=(11, 17), cell=CELL, positions=((0.0, 0.0, 0.0), (2.0, 2.0, 2.0)), **targets):
    return {"id": name, "atomic_numbers": list(z), "cell": cell, "positions": positions, **targets}


def cif(element="Na", x="0.0", occupancy="1", length="4.0"):
    return (
        f"data_a\n_cell_length_a {length}\n_cell_length_b 4\n_cell_length_c 4\n_cell_angle_alpha 90\n"
        "_cell_angle_beta 90\n_cell_angle_gamma 90\nloop_\n_atom_site_type_symbol\n_atom_site_fract_x\n"
        "_atom_site_fract_y\n_atom_site_fract_z\n_atom_site_occupancy\n"
        f"{element} {x} 0 0 {occupancy}\n"
    )


def written(tmp_path, content, name="in.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def run(tmp_path, content, **options):
    """Prepare a JSON list; return the summary, the dataset and the rows of rejects.csv."""
    options = {"workers": 0, "overwrite": True} | options
    summary = prepare(written(tmp_path, content), tmp_path / "dataset", **options)
    rows = rejects_of(tmp_path / "dataset")
    assert summary.read == summary.stored + summary.rejected
    assert summary.rejected == len(rows) == sum(summary.by_reason.values())
    return summary, CrystalDataset.open(tmp_path / "dataset"), rows


def rejects_of(folder):
    with (folder / REJECTS).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


NAN, INF = float("nan"), float("inf")
FLAT = [[4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [4.0, 4.0, 1e-4]]
SKEWED = [[4.0, 0.0, 0.0], [20.3, 0.5, 0.0], [0.0, 0.0, 4.0]]  # b - 5 a is 0.58 Å long, b · 2 - 10 a 1.17


@pytest.mark.parametrize(
    ("bad", "reason", "value", "message"),
    [
        (
            item(positions=[[0, 0, 0], [2, NAN, 2]]),
            "not_finite",
            "nan",
            "coordinates: row 1, column 1 is nan",
        ),
        (item(cell=[[INF, 0, 0], [0, 4, 0], [0, 0, 4]]), "not_finite", "inf", "cell: row 0, column 0 is inf"),
        (item(gap=INF), "not_finite", "inf", "gap is inf"),
        (item(z=(11, 119)), "unknown_element", "119", "119 is no chemical element"),
        (item(z=(11, 0)), "unknown_element", "0", "0 is no chemical element"),
        (item(z=(11, 1.5)), "unknown_element", "1.5", "1.5 is no chemical element"),
        (item(z=(11, 105)), "unknown_element", "105", "no published atom features"),
        (item(cell=FLAT), "near_zero_volume", "0.0016", "0.0016 Å^3 for 2 atoms"),
        (item(cell=np.zeros((3, 3)).tolist()), "near_zero_volume", "0", "0 Å^3"),
        (item(positions=[[0, 0, 0], [0, 0, 0.4]]), "atoms_too_close", "0.4", "atoms 0 and 1 are 0.4 Å apart"),
        (item(positions=[[0, 0, 0], [0, 0, 3.7]]), "atoms_too_close", "0.3", "atoms 0 and 1 are 0.3 Å apart"),
        (item(positions=[[1, 1, 1], [1, 1, 1]]), "atoms_too_close", "0", "structure 'x': atom 0 and atom 1"),
        (item(positions=[[0, 0, 0], [0, 0, 0.005]]), "atoms_too_close", "0.005", "are 0.005 Å apart"),
        (item(cell=[[0.004, 0, 0], [0, 99, 0], [0, 0, 99]]), "atoms_too_close", "0.004", "its own image"),
        (item(cell=[[1e200, 0, 0], [0, 1e200, 0], [0, 0, 4]]), "bad_cell", "[[1e+200, ", "overflows"),
        (item(cell=[[1e6, 0, 0], [0, 1, 0], [0, 0, 0.1]]), "bad_cell", "[[1000000.0, ", "less skewed cell"),
        (
            item(positions=[[0, 0, 0], [0, 5e6, 0]]),
            "bad_coordinates",
            "1.25e+06",
            "atom 1 is 1.25e+06 lattice",
        ),
        (item(cell=[[0.4, 0, 0], [0, 9, 0], [0, 0, 9]]), "atoms_too_close", "0.4", "0.4 Å apart"),
        (item(positions=[[0, 0, 0]]), "unreadable_record", "(1, 3)", "expected (2, 3) numbers, found (1, 3)"),
        (item(positions="here"), "unreadable_record", "here", "coordinates: expected numbers"),
        (item(z=(), positions=[]), "unreadable_record", "(0,)", "coordinates"),
        ({"id": "x"}, "unreadable_record", "{'id': 'x'}", "expected the keys"),
        (17, "unreadable_record", "17", "expected the keys"),
        (item(gap="high"), "target_not_a_number", "high", "gap is 'high', not a number"),
        (item(gap=None), "missing_target", "None", "no value for gap"),
        (item(gap="na"), "missing_target", "na", "no value for gap"),
        (item("good", gap=2.0), "duplicate_id", "good", "stored already"),
    ],
)
def test_a_bad_record_is_listed_and_the_rest_stored(tmp_path, bad, reason, value, message):
    if isinstance(bad, dict) and "positions" in bad:
        bad = {"gap": 1.0} | bad
    content = [item("good", gap=1.0), bad, item("also good", gap=3.0)]
    summary, dataset, rows = run(tmp_path, content, targets=["gap"])
    assert (summary.read, summary.stored, summary.rejected) == (3, 2, 1)
    assert list(dataset.ids) == ["good", "also good"]
    assert dataset.targets["gap"].tolist() == [1.0, 3.0]
    (row,) = rows
    assert row["reason"] == reason
    assert row["source"] == f"{tmp_path}/in.json: item 2"
    assert row["value"].startswith(value) if value.endswith(", ") else row["value"] == value
    assert message in row["message"]


@pytest.mark.parametrize(
    ("text", "reason", "value", "message"),
    [
        (cif(occupancy="0.5"), "partial_occupancy", "0.5", "atom 0 (Na) has occupancy 0.5"),
        (cif(element="Xx"), "unknown_element", "Xx", "'Xx' is no chemical element"),
        (cif(element="Vac1"), "unknown_element", "Vac1", "'Vac1' is no chemical element"),
        (cif(x="nan"), "not_finite", "nan", "_atom_site_fract_x of atom 0 is nan"),
        (cif(x="?"), "unreadable_cif", "?", "_atom_site_fract_x of atom 0 is missing"),
        (cif(x="left"), "unreadable_cif", "left", "'left', not a number"),
        (cif(length="inf"), "not_finite", "inf", "_cell_length_a is inf"),
        (cif(length="0"), "near_zero_volume", "0", "0 Å^3"),
        (cif(length="?"), "unreadable_cif", "?", "_cell_length_a is missing"),
        (cif().replace(" 90", " 150"), "near_zero_volume", None, "no cell has"),
        ("data_a\n_cell_length_a 4\n", "unreadable_cif", "None", "_cell_length_b is missing"),
        ("no cif at all", "unreadable_cif", "no cif at all", "expected block header"),
        ("", "unreadable_cif", "", "expected one data block, found 0"),
        (cif()[:-12], "unreadable_cif", None, "Wrong number of values"),
    ],
)
def test_a_bad_cif_is_listed_and_the_rest_stored(tmp_path, text, reason, value, message):
    content = [{"material_id": str(i), "structure": t} for i, t in enumerate([cif(), text, cif("K")])]
    summary, dataset, rows = run(tmp_path, content)
    assert list(dataset.ids) == ["0", "2"]
    assert summary.by_reason == {reason: 1}
    assert value is None or rows[0]["value"] == value
    assert message in rows[0]["message"]


def test_partial_occupancy_in_matbench(tmp_path):
    species = [{"element": "Na", "occu": 0.7}, {"element": "K", "occu": 0.3}]
    sites = {"lattice": {"matrix": CELL}, "sites": [{"species": species, "abc": [0, 0, 0]}]}
    summary, _, rows = run(tmp_path, {"index": [0], "columns": ["structure", "gap"], "data": [[sites, 1.0]]})
    assert summary.by_reason == {"partial_occupancy": 1}
    assert rows[0]["value"] == "Na 0.7, K 0.3"


def test_short_lattice_vectors_of_a_skewed_cell_are_found(tmp_path):
    positions = [[0.0, 0.0, 0.0], [20.3, 0.5, 0.3]]  # the second atom lies 0.3 Å above an image of the first
    summary, _, rows = run(tmp_path, [item(cell=SKEWED, positions=positions)])
    assert summary.by_reason == {"atoms_too_close": 1}
    assert float(rows[0]["value"]) == pytest.approx(0.3)


def test_a_bad_frame_does_not_spoil_an_xyz_file(tmp_path):
    good = '1\nLattice="4 0 0 0 4 0 0 0 4" pbc="T T T" energy={}\nNa 0 0 0\n'
    frames = [good.format(energy) for energy in (1, 2, 3, 4)]
    frames[1] = frames[1].replace("Na", "Zz")
    frames[2] = frames[2].replace("0 0\n", "0 q\n")
    path = written(tmp_path, "".join(frames) + "many\n", "frames.extxyz")
    summary = prepare(path, tmp_path / "dataset", workers=0)
    assert (summary.read, summary.stored) == (5, 2)
    rows = rejects_of(tmp_path / "dataset")
    assert [(row["id"], row["reason"], row["value"]) for row in rows[::2]] == [
        ("frames-2", "unknown_element", "Zz"),
        ("frames-5", "unreadable_record", "many"),
    ]
    assert rows[1]["reason"] == "unreadable_record"
    assert CrystalDataset.open(tmp_path / "dataset").targets["energy"].tolist() == [1, 4]


def test_an_uneven_csv_row_is_one_bad_record(tmp_path):
    path = written(tmp_path, f'id,cif,gap\na,"{cif()}",1\nb\nc,"{cif()}",2\n', "in.csv")
    summary = prepare(path, tmp_path / "dataset", workers=0)
    assert (summary.read, summary.stored) == (3, 2)
    assert "row 2" in rejects_of(tmp_path / "dataset")[0]["source"]


def test_coordinates_keep_their_precision_far_from_the_cell(tmp_path):
    _, dataset, _ = run(tmp_path, [item(positions=[[4e6 + 1.0, 0, 0], [-1.0, 2.0, 2.0]])])
    np.testing.assert_array_equal(dataset.gather([0]).frac_coords, [[1e6 + 0.25, 0, 0], [-0.25, 0.5, 0.5]])


@pytest.mark.parametrize("index", [1, 4, 12, 20])
def test_the_graph_of_a_stored_crystal_is_that_of_the_structure(tmp_path, index):
    """Ties among the lattice vectors and distances of the published builder hang on the last bit."""
    structure = prototype_structures()[index]
    frac = structure.frac_coords + np.array([0, -1, 0.1])
    original = Structure(structure.lattice, structure.species, frac)
    content = {"index": [0], "columns": ["structure"], "data": [[original.as_dict()]]}
    _, dataset, _ = run(tmp_path, content)
    expected, found = (
        build_graph(batch, compat="comformer")
        for batch in (CrystalBatch.from_structures([original]), dataset.gather([0]))
    )
    for name in ("numbers", "edge_index", "edge_vec", "cell_shift", "frame"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_nonperiodic_directions_are_kept(tmp_path):
    content = [item(positions=[[0, 0, 0], [0, 0, 5.0]], pbc=[True, True, False])]
    _, dataset, _ = run(tmp_path, content)
    crystal = dataset.gather([0])
    assert crystal.pbc.tolist() == [[True, True, False]]
    assert crystal.frac_coords[1].tolist() == [0, 0, 1.25]


MANY = [item(f"c{i}", gap=float(i), energy="na" if i % 2 else -1.0) for i in range(600)]


def test_which_targets(tmp_path):
    content = [dict(entry, formula="NaCl", flag=True, tags=[1, 2]) for entry in MANY[:4]]
    summary, dataset, _ = run(tmp_path, content)
    assert summary.targets == {"gap": 4, "energy": 2}
    np.testing.assert_array_equal(dataset.targets["energy"], [-1, np.nan, -1, np.nan])

    _, dataset, _ = run(tmp_path, content, targets={"gap": "band_gap"}, units={"band_gap": "eV"})
    assert dataset.target_units == {"band_gap": "eV"}
    with pytest.raises(PrepareError, match=r"none of the first 4 records has 'gop'; they have .*gap, energy"):
        run(tmp_path, content, targets=["gop"])
    with pytest.raises(PrepareError, match="same name"):
        run(tmp_path, content, targets={"gap": "y", "energy": "y"})
    with pytest.raises(PrepareError, match="unit was given for 'gop'"):
        run(tmp_path, content, units={"gop": "eV"})


def test_a_target_that_comes_late_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("mgt_fast.data.ingest.SAMPLE_SIZE", 2)
    content = [item("a", gap=1.0), item("b", gap=1.0), item("c", gap=1.0, late=2.0)]
    summary, dataset, _ = run(tmp_path, content)
    assert set(dataset.targets) == {"gap"}
    assert any("'late'" in note and "item 3" in note for note in summary.notes)


def test_a_stray_text_among_numbers_costs_its_record_alone(tmp_path):
    content = [item(f"c{i}", gap=gap, formula="NaCl" * 20) for i, gap in enumerate(["1.5", ">3", None, 2.0])]
    summary, dataset, rows = run(tmp_path, content, require_target="none")
    assert dataset.targets["gap"][[0, 2]].tolist() == [1.5, 2.0]
    assert [(row["id"], row["reason"], row["value"]) for row in rows] == [("c1", "target_not_a_number", ">3")]
    (note,) = summary.notes
    assert note == "not numbers, left out: formula (NaClNaClNaClNaClNaClNaClNaClNa)"


def test_every_key_left_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("mgt_fast.data.ingest.SAMPLE_SIZE", 2)
    content = [item("a", gap=1.0, flag=True), item("b", gap=1.0), item("c", gap=1.0, remark="odd")]
    summary, _, _ = run(tmp_path, content)
    assert summary.notes == ["not numbers, left out: flag (True), remark (odd)"]
    summary, _, _ = run(tmp_path, content, targets=["gap"])
    assert summary.notes == []


def test_a_split_column_gives_the_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("mgt_fast.data.ingest.SAMPLE_SIZE", 4)
    parts = ["train", "val", "test", "", "train", "validation"]
    rows = "".join(f'c{i},"{cif()}",{i},{part}\n' for i, part in enumerate(parts))
    path = written(tmp_path, "id,cif,gap,split\n" + rows, "in.csv")
    summary = prepare(path, tmp_path / "column", workers=0)
    assert CrystalDataset.open(tmp_path / "column").split.tolist() == parts[:5]
    assert summary.notes == ["the column 'split' told the part of each crystal"]
    (row,) = rejects_of(tmp_path / "column")
    assert (row["id"], row["reason"], row["value"]) == ("c5", "unknown_split", "validation")

    split_file = written(tmp_path, {"test": ["c0"]}, "split.json")
    summary = prepare(path, tmp_path / "file", split_file=split_file, workers=0)
    assert CrystalDataset.open(tmp_path / "file").split.tolist() == ["test", "", "", "", "", ""]
    assert summary.notes == ["not numbers, left out: split (train)"]


def test_a_column_split_of_other_things_gives_no_parts(tmp_path):
    frame = '1\nLattice="4 0 0 0 4 0 0 0 4" split="1 2" energy=1\nNa 0 0 0\n'
    summary = prepare(written(tmp_path, frame, "in.xyz"), tmp_path / "dataset", workers=0)
    assert (summary.stored, summary.splits) == (1, {"": 1})
    assert summary.notes == ["not numbers, left out: split ([1 2])"]


@pytest.mark.parametrize(("require", "stored"), [("any", 4), ("all", 2), ("none", 5)])
def test_required_targets(tmp_path, require, stored):
    content = [*MANY[:4], item("bare", gap=None, energy=None)]
    summary, _, _ = run(tmp_path, content, require_target=require)
    assert summary.stored == stored
    assert set(summary.by_reason) <= {"missing_target"}


def test_parts_from_a_split_file(tmp_path):
    as_lists = written(tmp_path, {"train": ["c0", "c1"], "val": ["c2"], "test": ["gone"]}, "lists.json")
    as_objects = written(
        tmp_path, {"train": {"c0": 1, "c1": 2}, "val": {"c2": 3}, "test": {"gone": 4}}, "o.json"
    )
    as_table = written(tmp_path, "id,split\nc0,train\nc1,train\nc2,val\ngone,test\n", "split.csv")
    for split_file in (as_lists, as_objects, as_table):
        summary, dataset, _ = run(tmp_path, MANY[:4], split_file=split_file)
        assert dataset.split.tolist() == ["train", "train", "val", ""]
        assert summary.splits == {"train": 2, "val": 1, "": 1}
        assert any("1 of the 4 ids" in note for note in summary.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"training": ["c0"]}', "part 'training' of 'c0'"),
        ('{"train": ["c0"], "test": ["c0"]}', "'c0' is both in train and in test"),
        ('{"train": 3}', "is no split file"),
        ("name,part\nc0,train\n", "is no split file"),
    ],
)
def test_wrong_split_files(tmp_path, text, message):
    with pytest.raises(PrepareError, match=message):
        run(tmp_path, MANY[:2], split_file=written(tmp_path, text, "split.txt"))


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path):
    """600 records in three chunks, duplicates and faults among them, give the same bytes."""
    content = [*MANY, item("c3", gap=0.0), item("bad", cell=FLAT, gap=0.0), item("c0", gap=0.0)]
    path = written(tmp_path, content)
    folders = [tmp_path / f"with-{workers}" for workers in (0, 2)]
    for workers, folder in zip((0, 2), folders, strict=True):
        summary = prepare(path, folder, workers=workers, shard_size=250)
        assert (summary.read, summary.stored) == (603, 600)
        assert summary.by_reason == {"duplicate_id": 2, "near_zero_volume": 1}
    names = sorted(file.name for file in folders[0].iterdir())
    assert len(names) == 6
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


SALT = Arrays([11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]], CELL, cartesian=False)


def test_records_that_ask_too_much_of_their_worker_are_rejected():
    deaths = {
        "crashes": ("parser_failure", "SIGSEGV"),
        "sleeps": ("timeout", "more than 2 s"),
        "computes": ("timeout", "more than 0.5 s of processor time"),
        "hoards": ("out_of_memory", "MemoryError"),
        "is killed": ("out_of_memory", "killed"),
        "exits": ("parser_failure", "exit status 1"),
    }
    payloads = [payload for what in deaths for payload in (SALT, Culprit(what))]
    chunks = [
        [RawRecord("s", f"{c}-{i}", payload) for i, payload in enumerate(payloads[c : c + 6])] for c in (0, 6)
    ]
    options = ParseOptions({}, limits=Limits(seconds=0.5, stall=2.0))
    found = [parsed for _, parsed in parse_all(chunks, options, workers=2)]
    assert [parsed.kept for parsed in found] == [[0, 2, 4]] * 2
    rejected = [entry for parsed in found for entry in parsed.rejected]
    assert [i for i, _ in rejected] == [1, 3, 5] * 2
    for (_, error), (reason, words) in zip(rejected, deaths.values(), strict=True):
        assert (error.reason, error.value) == (reason, "Culprit")
        assert words in error.message
    assert found[1].batch.column("id").to_pylist() == ["6-0", "6-2", "6-4"]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_record_of_which_all_together_die_is_found(monkeypatch, workers):
    def fail_in_process(records, *_):
        if any(record.id == "greedy" for record in records):
            raise LostError(len(records), "timeout", "too long")
        return parse_chunk(records, ParseOptions({}))

    monkeypatch.setattr("mgt_fast.data.parse.parse_chunk", lost_over_all_of if workers else fail_in_process)
    records = [RawRecord("s", name, SALT) for name in ("a", "b", "greedy", "c")]
    ((_, parsed),) = parse_all([records], ParseOptions({}), workers)
    assert parsed.kept == [0, 1, 3]
    assert [(i, error.reason) for i, error in parsed.rejected] == [(2, "timeout")]
    assert parsed.batch.column("id").to_pylist() == ["a", "b", "c"]


def test_a_parser_that_raises_anything_is_a_rejected_record():
    class Surprise:
        def crystal(self):
            raise ZeroDivisionError("surprise")

    parsed = parse_chunk([RawRecord("s", "a", Surprise()), RawRecord("s", "b", SALT)], ParseOptions({}))
    assert parsed.kept == [1]
    assert parsed.rejected[0][1].reason == "unreadable_record"
    assert "ZeroDivisionError: surprise" in parsed.rejected[0][1].message


def test_output_is_replaced_only_on_request(tmp_path):
    run(tmp_path, MANY[:2])
    with pytest.raises(DatasetError, match=r"exists already.*--overwrite, overwrite=True"):
        run(tmp_path, MANY[:3], overwrite=False)
    with pytest.raises(PrepareError):
        run(tmp_path, "[{]")
    assert len(CrystalDataset.open(tmp_path / "dataset")) == 2  # the failed run touched nothing
    _, dataset, _ = run(tmp_path, MANY[:3])
    assert len(dataset) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset", "in.json"]


def test_wrong_arguments(tmp_path):
    for options, message in [
        ({"workers": -1}, "workers = -1; it must be 0"),
        ({"require_target": "some"}, "choose one of any, all, none"),
        ({"shard_size": 0}, "shard_size = 0"),
        ({"split_file": tmp_path / "none.json"}, r"none\.json does not exist"),
        ({"labels": tmp_path / "none.csv"}, r"none\.csv does not exist"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(tmp_path, MANY[:2], **options)
    with pytest.raises(PrepareError, match="no input"):
        prepare([], tmp_path / "dataset")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_and_summary(tmp_path, terminal, monkeypatch):
    monkeypatch.setattr("mgt_fast.data.ingest.PLAIN_INTERVAL", 0.0)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    summary, _, _ = run(tmp_path, [*MANY, item("bad", cell=FLAT, gap=1.0)], console=console)
    shown = console.file.getvalue()
    assert "601 read, 600 stored, 1 rejected" in shown
    assert ("\x1b[" in shown) == terminal
    text = str(summary)
    assert "600 crystals stored of 601 read, 1 rejected" in text
    assert "near_zero_volume 1" in text
    assert "target energy: 300 values" in text
