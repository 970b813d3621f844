"""Inputs made to fill the memory, to work for ever, or to break what reads them (more in tests/fuzz)."""

import csv
import gzip
import io
import json
import pickle
import re
import sqlite3
import struct
import tarfile
import zipfile

import ase.db
import numpy as np
import pytest
from ase import Atoms

from mgt_fast.data import CrystalDataset, PrepareError, prepare
from mgt_fast.data.ingest import MAX_TARGETS, REJECTS
from mgt_fast.data.readers import base, cif
from mgt_fast.data.readers.base import Arrays, RecordError
from mgt_fast.data.readers.cif import CifText
from mgt_fast.data.readers.crystallm import load

CELL = [[4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 4.0]]
HEAD = (
    "data_a\n_cell_length_a 4\n_cell_length_b 4\n_cell_length_c 4\n"
    "_cell_angle_alpha 90\n_cell_angle_beta 90\n_cell_angle_gamma 90\n"
)
ATOMS = "loop_\n_atom_site_type_symbol\n_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z\n"
CIF = f"{HEAD}{ATOMS}Na 0 0 0\n"


def item(name="x", **others):
    return {"id": name, "atomic_numbers": [11], "cell": CELL, "positions": [[0, 0, 0]], **others}


def prepared(tmp_path, files):
    """Prepare a folder with these files and a sound one; return the summary and the rejects by source."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name, content in (files | {"sound.cif": CIF}).items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    summary = prepare(folder, tmp_path / "dataset", workers=0, require_target="none")
    with (tmp_path / "dataset" / REJECTS).open(newline="", encoding="utf-8") as file:
        rejects = {row["source"].removeprefix(f"{folder}/"): row for row in csv.DictReader(file)}
    assert summary.read == summary.stored + len(rejects)
    assert "sound" in CrystalDataset.open(tmp_path / "dataset").ids
    return summary, rejects


def zipped(members, kind=zipfile.ZIP_DEFLATED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, kind)
    return stream.getvalue()


def tarred(members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def nested(depth):
    content = CIF.encode()
    for level in range(depth):
        content = zipped({"a.cif" if level == 0 else "a.zip": content})
    return content


BOMB = bytes(base.MAX_UNPACKED + 1)
MEMO = b"\x80\x02]r" + struct.pack("<I", 2**31 - 1) + b"."  # the unpickler makes room for 2^32 entries
TWINS = b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"}h\x00K\x01s."  # hashed 2^60 times, as a key


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.cif.gz", gzip.compress(BOMB), r"cannot be read: .*unpacks to more than 67108864 bytes"),
        ("a.zip", zipped({"bomb.cif": BOMB}), r"bomb.cif cannot be read: .*unpacks to 67108865 bytes"),
        ("a.tar.gz", tarred({"bomb.cif": BOMB}), r"unpacks to more than"),
        ("a.zip", nested(5), r"a.zip/a.zip/a.zip/a.zip cannot be read: .*archive within so many others"),
        ("a.json", f"[{'9' * 5000}]", "is no valid JSON: Exceeds the limit"),
        ("a.json", "[" * 100_000, "is no valid JSON"),
        ("a.pkl", TWINS, "it asks for EMPTY_DICT"),
        ("a.pkl", pickle.dumps([{"a": 1}]), "it asks for EMPTY_DICT"),
        ("a.pkl", pickle.dumps([1 << 70]), "it asks for LONG1"),
        ("a.pkl", MEMO + b"]", "holds no record"),
    ],
)
def test_files_that_ask_too_much_are_one_rejected_record(tmp_path, name, content, message):
    if message == "holds no record":  # an empty list, made in an odd way, is no fault
        assert load(io.BytesIO(MEMO)) == []
        return
    summary, rejects = prepared(tmp_path, {name: content})
    assert summary.by_reason == {"unreadable_file": 1}
    assert re.search(message, next(iter(rejects.values()))["message"])


def test_three_archives_within_one_another_are_read(tmp_path):
    summary, _ = prepared(tmp_path, {"a.zip": nested(3)})
    assert summary.stored == 2


def test_what_unpacks_to_much_but_is_large_itself_is_read():
    stream = io.BytesIO(gzip.compress(np.random.default_rng(0).bytes(2**20), 0) * 80)
    with base.Source("a.gz", "a", lambda: stream).open() as unpacked:
        assert len(unpacked.read()) == 80 * 2**20
        assert unpacked.seek(5) == 5
        assert unpacked.seek(2**20, io.SEEK_CUR) == 2**20 + 5


def test_billion_laughs_are_told_in_a_few_words(tmp_path):
    laughs = ["lol"]
    for _ in range(60):
        laughs = [laughs, laughs]
    _, rejects = prepared(tmp_path, {"a.pkl": pickle.dumps([laughs])})
    assert rejects["a.pkl: item 1"]["reason"] == "unreadable_record"
    assert len(rejects["a.pkl: item 1"]["value"]) <= 200


def test_files_without_a_crystal_are_mentioned(tmp_path):
    files = {"a.cif": "data_a\n_x 1\ndata_b\n_x 1\n", "b.zip": zipped({".hidden.cif": CIF}), "c.xyz": "\n"}
    summary, _ = prepared(tmp_path, files)
    assert (summary.read, summary.stored) == (1, 1)
    (note,) = summary.notes
    assert note.startswith("3 files without crystals were left out")
    assert all(name in note for name in files)


def test_names_that_are_no_text(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b\udcff.cif").write_text(CIF)
    (tmp_path / "in" / "a.json").write_bytes(json.dumps([item("\ud800"), item("\udfff", cell=0)]).encode())
    (tmp_path / "in" / "c.zip").write_bytes(zipped({"": CIF}))
    summary = prepare(tmp_path / "in", tmp_path / "dataset", workers=0)
    assert set(CrystalDataset.open(tmp_path / "dataset").ids) == {"\\ud800", "b\\udcff", "."}
    assert "\\udfff" in (tmp_path / "dataset" / REJECTS).read_text(encoding="utf-8")
    str(summary).encode()


def test_keys_that_cannot_be_columns_are_left_out_and_named(tmp_path):
    odd = {"split": 1.0, "numbers": 1.0, "\ud800": 1.0}
    content = json.dumps([item(gap=1.0, **odd, **{f"key {k}": k for k in range(MAX_TARGETS)})])
    summary, _ = prepared(tmp_path, {"a.json": content})
    targets = CrystalDataset.open(tmp_path / "dataset").targets
    assert len(targets) == MAX_TARGETS
    assert "gap" in targets
    (note,) = summary.notes
    assert note.startswith("4 keys that hold numbers cannot be columns")
    assert "'split', 'numbers', '\\ud800', 'key 999'" in note


@pytest.mark.parametrize(("number", "sign"), [(10**400, ""), (-(10**400), "-")])
def test_an_integer_beyond_floats_is_infinite(tmp_path, number, sign):
    content = json.dumps([item("a", gap=number), item("b", gap=1.0)])
    _, rejects = prepared(tmp_path, {"a.json": content})
    assert rejects["a.json: item 1"]["reason"] == "not_finite"
    assert rejects["a.json: item 1"]["value"].startswith(f"{sign}1000")


def with_operations(count, atoms=1):
    operations = "".join(f"'x,y,z+{k % 24}/24'\n" for k in range(count))
    return f"{HEAD}loop_\n_symmetry_equiv_pos_as_xyz\n{operations}{ATOMS}" + "Na 0 0 0\n" * atoms


@pytest.mark.parametrize(
    ("text", "reason", "message"),
    [
        (CIF + "#" * base.MAX_TEXT, "too_large", "more than 16777216 characters"),
        (HEAD + ATOMS + "Na 0 0 0\n" * (base.MAX_ATOMS + 1), "too_many_atoms", "100001 atoms or more"),
        (CIF + "loop_\n_atom_site_occupancy\n1\n1\n", "unreadable_cif", "occupancy has 2 values for 1 atoms"),
        (with_operations(cif.MAX_OPERATIONS + 1), "unreadable_cif", "1001 symmetry operations are listed"),
        (with_operations(900, 50), "too_many_atoms", "900 symmetry operations on 50 atoms"),
    ],
)
def test_cifs_that_ask_too_much(text, reason, message):
    with pytest.raises(RecordError, match=message) as fault:
        CifText(text).crystal()
    assert fault.value.reason == reason


def test_arrays_of_too_many_atoms():
    with pytest.raises(RecordError, match="100001 atoms or more, the limit is 100000"):
        Arrays([11] * (base.MAX_ATOMS + 1), [], CELL, cartesian=False).crystal()


def test_a_data_block_within_a_text_field_is_none(tmp_path):
    text = CIF.replace("loop_", "_publ_text\n;\ndata_evil\n_cell_length_a 1\n;\nloop_")
    _, rejects = prepared(tmp_path, {"a.cif": text, "b.cif": text + CIF.replace("data_a", "data_b")})
    assert not rejects
    assert list(CrystalDataset.open(tmp_path / "dataset").ids) == ["a", "b/a", "b/b", "sound"]


def test_a_block_beyond_the_limit_is_one_record(tmp_path, monkeypatch):
    monkeypatch.setattr("mgt_fast.data.readers.cif.MAX_TEXT", 1000)
    monkeypatch.setattr("mgt_fast.data.readers.base.MAX_TEXT", 1000)
    text = CIF + "# " + "x" * 5000 + "\n" + CIF.replace("data_a", "data_b")
    _, rejects = prepared(tmp_path, {"in.cif": text})
    assert rejects["in.cif: data_a"]["reason"] == "too_large"
    assert list(CrystalDataset.open(tmp_path / "dataset").ids) == ["in/b", "sound"]


@pytest.mark.parametrize(
    ("count", "reasons"),
    [
        ("9" * 30, {"unreadable_record": 1}),
        ("100001", {"too_many_atoms": 1}),
        ("٣", {"unreadable_record": 1}),
    ],
)
def test_frames_of_too_many_atoms(tmp_path, count, reasons):
    summary, _ = prepared(tmp_path, {"a.xyz": f'{count}\nLattice="4 0 0 0 4 0 0 0 4"\nNa 0 0 0\n'})
    assert summary.by_reason == reasons


@pytest.mark.parametrize("count", ["999999998", "50000 -1 50001", "9 99999999999999999999 ! x"])
@pytest.mark.parametrize("symbols", ["", "Na Cl K\n"])
def test_poscars_of_too_many_atoms(tmp_path, count, symbols):
    text = f"Na Cl K\n1\n4 0 0\n0 4 0\n0 0 4\n{symbols}{count}\nDirect\n0 0 0\n"
    _, rejects = prepared(tmp_path, {"a.vasp": text})
    assert rejects["a.vasp"]["reason"] == "too_many_atoms"
    assert "atoms or more, the limit is 100000" in rejects["a.vasp"]["message"]


def test_frames_of_too_many_columns(tmp_path):
    comment = 'Lattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3:x:R:999999999'
    _, rejects = prepared(tmp_path, {"a.xyz": f"1\n{comment}\nNa 0 0 0\n"})
    assert rejects["a.xyz: frame 1"]["reason"] == "too_large"
    assert "1000000003 columns, the limit is 1000" in rejects["a.xyz: frame 1"]["message"]


def test_a_database_with_a_program_in_it(tmp_path):
    with ase.db.connect(tmp_path / "a.db") as rows:
        rows.write(Atoms("Na", cell=CELL, pbc=True))
    endless = "WITH RECURSIVE r(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM r) SELECT id FROM r"
    connection = sqlite3.connect(tmp_path / "a.db")
    connection.execute(f"CREATE VIEW others AS {endless}")
    connection.close()
    with pytest.raises(PrepareError, match=r"a\.db holds a view, which an ASE database does not"):
        prepare(tmp_path / "a.db", tmp_path / "dataset", workers=0)


def test_many_atoms_in_a_small_place_are_refused_before_their_pairs_are_listed(tmp_path, monkeypatch):
    """All 20,000 are within 0.5 Å of all others: the list of close pairs would have 2·10^8."""
    monkeypatch.setattr("mgt_fast.data.parse._closest_pairs", lambda *_: {})
    positions = (0.25 * np.random.default_rng(0).random((20_000, 3))).tolist()
    crowd = item(
        "crowd", atomic_numbers=[11] * 20_000, positions=positions, cell=(25.0 * np.array(CELL)).tolist()
    )
    _, rejects = prepared(tmp_path, {"a.json": json.dumps([crowd])})
    row = rejects["a.json: item 1"]
    assert row["reason"] == "atoms_too_close"
    i, j = map(int, re.match(r"atoms (\d+) and (\d+) are", row["message"]).groups())
    assert np.linalg.norm(np.subtract(positions[i], positions[j])) == pytest.approx(
        float(row["value"]), rel=1e-4
    )
    assert float(row["value"]) < 0.45


@pytest.mark.parametrize("workers", [0, 1])
def test_lists_within_lists_within_lists(tmp_path, workers):
    """As deep as JSON can be read they cannot be pickled, nor shown in full."""
    deep = "[" * 700 + "]" * 700
    records = [
        item("a"),
        item("b", positions="deep"),
        item("c", gap="deep"),
        {"id": "d", "x": "deep"},
        item("e"),
    ]
    (tmp_path / "a.json").write_text(json.dumps(records).replace('"deep"', deep))
    summary = prepare(tmp_path / "a.json", tmp_path / "dataset", workers=workers)
    assert summary.by_reason["unreadable_record"] >= 2
    assert {"a", "e"} <= set(CrystalDataset.open(tmp_path / "dataset").ids)
