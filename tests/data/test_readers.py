"""Each input family on tiny inputs written here, and on third-party data where it is present."""

import csv
import gzip
import io
import json
import os
import pickle
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mgt_fast.data import CrystalDataset, PrepareError, prepare
from mgt_fast.data.readers import FORMATS
from mgt_fast.data.readers.base import RecordError
from mgt_fast.data.readers.cif import CifText
from mgt_fast.data.readers.inputs import Inputs

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"
CELL = [[4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 5.0]]
FRAC = [[0.0, 0.0, 0.0], [0.5, 0.5, 0.25]]
CARTESIAN = (np.array(FRAC) @ CELL).tolist()
CIF = """data_NaCl
_cell_length_a 4.0
_cell_length_b 4.0(2)
_cell_length_c 5.0
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
loop_
_atom_site_type_symbol
_atom_site_label
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
Na+ Na1 0.0 0.0 0.0 1
Cl- Cl1 0.5 0.5 0.25 1.0
"""
POSCAR = """NaCl
1.0
4 0 0
0 4 0
0 0 5
Na Cl
1 1
Direct
0 0 0
0.5 0.5 0.25
"""
PYMATGEN = {
    "@module": "pymatgen.core.structure",
    "@class": "Structure",
    "lattice": {"matrix": CELL, "pbc": [True, True, True]},
    "sites": [
        {"species": [{"element": element, "occu": 1}], "abc": abc}
        for element, abc in zip(["Na", "Cl"], FRAC, strict=True)
    ],
}


def read(inputs, tmp_path, **options):
    """Prepare, check that every crystal is NaCl, and return (dataset, summary)."""
    options = {"workers": 0, "overwrite": True} | options
    summary = prepare(inputs, tmp_path / "dataset", **options)
    assert summary.rejected == 0, (tmp_path / "dataset" / "rejects.csv").read_text()
    assert summary.read == summary.stored
    dataset = CrystalDataset.open(tmp_path / "dataset")
    for i in range(len(dataset)):
        crystal = dataset.gather([i])
        assert crystal.numbers.tolist() == [11, 17]
        np.testing.assert_allclose(crystal.cell[0], CELL, atol=1e-6)
        np.testing.assert_allclose(crystal.frac_coords, FRAC, atol=1e-6)
        assert crystal.pbc.all()
    return dataset, summary


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tarred(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content.encode()))
    return path


def gzipped(path, text):
    path.write_bytes(gzip.compress(text.encode()))
    return path


def test_cif_file(tmp_path):
    (tmp_path / "salt-1.5.cif").write_text(CIF)
    dataset, _ = read(tmp_path / "salt-1.5.cif", tmp_path)
    assert list(dataset.ids) == ["salt-1.5"]
    assert dataset.targets == {}


def test_cif_with_several_blocks(tmp_path):
    text = (
        "data_global\n_publ_text\n;\ndata_in_a_text_field\n;\n" + CIF + CIF.replace("data_NaCl", "data_again")
    )
    (tmp_path / "two.cif").write_text(text)
    dataset, _ = read(tmp_path / "two.cif", tmp_path)
    assert list(dataset.ids) == ["two/NaCl", "two/again"]


FILES = {"set/b.cif": CIF, "set/deep/a.cif": CIF, "__MACOSX/set/._b.cif": "junk", "set/.DS_Store": "junk"}


def test_folder(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "in" / "set" / "LICENSE").write_text("free")
    (tmp_path / "in" / "set" / "settings.json").write_text("{}")
    dataset, summary = read(tmp_path / "in", tmp_path)
    assert list(dataset.ids) == ["b", "deep/a"]
    assert any("2 files without crystals" in note and "LICENSE" in note for note in summary.notes)


@pytest.mark.parametrize(("pack", "name"), [(zipped, "in.zip"), (tarred, "in.tar.gz")])
def test_archives(tmp_path, pack, name):
    dataset, _ = read(pack(tmp_path / name, FILES), tmp_path)
    assert list(dataset.ids) == ["b", "deep/a"]


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_archive_members_never_become_paths(tmp_path, pack):
    """A member with a hostile name is read like any other and nothing is written outside the output."""
    (tmp_path / "work").mkdir()
    pack(tmp_path / "work" / "in.zip", {"../../escaped.cif": CIF, "/absolute.cif": CIF})
    _, summary = read(tmp_path / "work" / "in.zip", tmp_path / "work")
    assert summary.stored == 2
    assert not list(tmp_path.rglob("*escaped*"))
    assert not Path("/absolute.cif").exists()


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz"])
def test_csv(tmp_path, name):
    header = "# a comment\n,material_id,formula,cif,gap,energy\n"
    text = f'{header}0,x,NaCl,"{CIF}",1.5,na\n1,y,NaCl,"{CIF}",,-2\n'
    path = gzipped(tmp_path / name, text) if name.endswith("gz") else tmp_path / name
    if path.suffix == ".csv":
        path.write_text(text)
    dataset, _ = read(path, tmp_path)
    assert list(dataset.ids) == ["x", "y"]
    assert set(dataset.targets) == {"gap", "energy"}
    np.testing.assert_array_equal(dataset.targets["gap"], [1.5, np.nan])
    np.testing.assert_array_equal(dataset.targets["energy"], [np.nan, -2])


@pytest.mark.parametrize("header", ["", "file,energy\n"])
@pytest.mark.parametrize("kind", ["folder", "zip", "beside"])
def test_poscars_with_id_prop(tmp_path, kind, header):
    labels = header + "POSCAR_2.vasp,2.5\nPOSCAR_1,1.5\n"
    files = {"set/POSCAR_1.vasp": POSCAR, "set/POSCAR_2.vasp": POSCAR, "__MACOSX/set/._POSCAR_1.vasp": "junk"}
    if kind == "beside":
        path = zipped(tmp_path / "in.zip", files)
        (tmp_path / "O_id_prop.csv").write_text(labels)
    elif kind == "zip":
        path = zipped(tmp_path / "in.zip", files | {"set/id_prop.csv": labels})
    else:
        path = tmp_path / "in"
        (path / "set").mkdir(parents=True)
        for name in ("POSCAR_1.vasp", "POSCAR_2.vasp"):
            (path / "set" / name).write_text(POSCAR)
        (path / "set" / "id_prop.csv").write_text(labels)
    dataset, summary = read(path, tmp_path)
    assert list(dataset.ids) == ["POSCAR_1", "POSCAR_2"]
    assert dataset.targets["energy" if header else "target"].tolist() == [1.5, 2.5]
    assert any("2 labels were read" in note for note in summary.notes)


def test_labels_that_name_nothing_are_reported(tmp_path):
    path = zipped(tmp_path / "in.zip", {"a.cif": CIF, "id_prop.csv": "a.cif,1\nb.cif,2\n"})
    _, summary = read(path, tmp_path)
    assert any("1 rows" in note and "'b.cif'" in note for note in summary.notes)


def test_the_nearest_labels_count_and_the_others_are_not_missed(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "id_prop.csv").write_text("a.cif,1\n")
    zipped(tmp_path / "in" / "in.zip", {"a.cif": CIF, "id_prop.csv": "a.cif,2\n"})
    dataset, summary = read(tmp_path / "in", tmp_path)
    assert dataset.targets["target"].tolist() == [2]
    outer, inner = (f"{tmp_path}/in/{name}" for name in ("id_prop.csv", "in.zip/id_prop.csv"))
    assert summary.notes == [
        f"{outer} was not used: the labels came from {inner}",
        f"1 labels were read from {inner}",
    ]


JARVIS = [
    {
        "jid": f"JVASP-{cartesian}",
        "atoms": {
            "lattice_mat": CELL,
            "coords": CARTESIAN if cartesian else FRAC,
            "elements": ["Na", "Cl"],
            "cartesian": cartesian,
        },
        "gap": gap,
        "formula": "NaCl",
    }
    for cartesian, gap in ((True, "na"), (False, 2.0))
]
MATERIALS_PROJECT = [{"material_id": "mp-1", "structure": CIF, "gap": 2.0}]
ATOMS = [{"structure_id": "7", "positions": CARTESIAN, "cell": CELL, "atomic_numbers": [11, 17], "y": [2.0]}]
MATBENCH = {"index": [0, 1], "columns": ["structure", "gap"], "data": [[PYMATGEN, 1.0], [PYMATGEN, 2.0]]}


def test_jarvis_and_megnet(tmp_path):
    path = zipped(tmp_path / "jdft_3d.json.zip", {"jdft_3d.json": json.dumps(JARVIS)})
    dataset, _ = read(path, tmp_path, require_target="none")
    assert list(dataset.ids) == ["JVASP-True", "JVASP-False"]
    np.testing.assert_array_equal(dataset.targets["gap"], [np.nan, 2.0])


def test_materials_project(tmp_path):
    path = zipped(tmp_path / "mp.2018.6.1.json.zip", {"mp.2018.6.1.json": json.dumps(MATERIALS_PROJECT)})
    dataset, _ = read(path, tmp_path)
    assert list(dataset.ids) == ["mp-1"]
    assert dataset.targets["gap"].tolist() == [2.0]


def test_matbench(tmp_path):
    path = gzipped(tmp_path / "matbench_phonons.json.gz", json.dumps(MATBENCH))
    dataset, _ = read(path, tmp_path)
    assert list(dataset.ids) == ["mb-phonons-1", "mb-phonons-2"]
    assert dataset.targets["gap"].tolist() == [1.0, 2.0]


def test_lists_of_atoms(tmp_path):
    (tmp_path / "atoms.json").write_text(json.dumps(ATOMS))
    dataset, _ = read(tmp_path / "atoms.json", tmp_path)
    assert list(dataset.ids) == ["7"]
    assert dataset.targets["y"].tolist() == [2.0]


def ase_atoms():
    from ase import Atoms

    return Atoms(["Na", "Cl"], scaled_positions=FRAC, cell=CELL, pbc=True)


def test_extxyz(tmp_path):
    import ase.io
    from ase.calculators.singlepoint import SinglePointCalculator

    frames = []
    for energy in (-1.0, -2.0):
        atoms = ase_atoms()
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((2, 3)))
        atoms.info["config"] = "bulk"
        frames.append(atoms)
    ase.io.write(tmp_path / "frames.extxyz", frames)
    dataset, _ = read(tmp_path / "frames.extxyz", tmp_path)
    assert list(dataset.ids) == ["frames-1", "frames-2"]
    assert set(dataset.targets) == {"energy"}
    assert dataset.targets["energy"].tolist() == [-1.0, -2.0]


def test_ase_database(tmp_path):
    import ase.db

    with ase.db.connect(tmp_path / "crystals.db") as database:
        database.write(ase_atoms(), gap=1.5, material_id="mp-9")
        database.write(ase_atoms(), gap=2.5)
    dataset, _ = read(tmp_path / "crystals.db", tmp_path)
    assert list(dataset.ids) == ["mp-9", "crystals-2"]
    assert dataset.targets["gap"].tolist() == [1.5, 2.5]


def test_crystallm(tmp_path):
    path = tmp_path / "cifs_v1.pkl.gz"
    path.write_bytes(gzip.compress(pickle.dumps([("oqmd-1", CIF), ("oqmd-2", CIF)])))
    dataset, _ = read(path, tmp_path)
    assert list(dataset.ids) == ["oqmd-1", "oqmd-2"]


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_executes_nothing(tmp_path, protocol):
    path = tmp_path / "cifs.pkl"
    path.write_bytes(pickle.dumps([("a", Bomb(tmp_path / "exploded"))], protocol=protocol))
    with pytest.raises(PrepareError, match=r"cifs.pkl is not read: UnpicklingError: it asks for .*mkdir"):
        prepare(path, tmp_path / "dataset", workers=0)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(path.read_bytes())  # the bomb is live
    assert (tmp_path / "exploded").exists()


def test_a_pickle_of_nonsense_is_refused_clearly(tmp_path):
    path = tmp_path / "cifs.pkl"
    path.write_bytes(b"\x80\x04]\x8c\x01aK\x02s.")  # it sets an item of a list by a text
    with pytest.raises(PrepareError, match=r"cifs\.pkl is not read: UnpicklingError: it asks for SETITEM"):
        prepare(path, tmp_path / "dataset", workers=0)


def test_what_a_pickle_may_hold(tmp_path):
    for content in ({"a": CIF}, np.float64(1.0)):
        (tmp_path / "cifs.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(PrepareError, match=r"cifs\.pkl"):
            prepare(tmp_path / "cifs.pkl", tmp_path / "dataset", workers=0)


def symmetric_cif(structure):
    from pymatgen.io.cif import CifWriter

    return str(CifWriter(structure, symprec=0.01))


@pytest.mark.filterwarnings("ignore:Set OLD_ERROR_HANDLING:DeprecationWarning")  # spglib
@pytest.mark.parametrize("prototype", ["rock salt", "hexagonal", "spinel"])
def test_symmetry_gives_the_atoms_that_pymatgen_finds(prototype):
    from pymatgen.core import Lattice, Structure

    if prototype == "rock salt":
        structure = Structure.from_spacegroup(
            "Fm-3m", Lattice.cubic(5.6), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3]
        )
    elif prototype == "hexagonal":
        lattice = Lattice.hexagonal(3.2, 5.2)
        structure = Structure(lattice, ["Mg", "Mg"], [[1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75]])
    else:
        coords = [[0.125] * 3, [0.5] * 3, [0.2624] * 3]
        structure = Structure.from_spacegroup("Fd-3m:2", Lattice.cubic(8.08), ["Mg", "Al", "O"], coords)
    crystal = CifText(symmetric_cif(structure)).crystal()
    assert sorted(crystal.numbers) == sorted(structure.atomic_numbers)
    assert abs(np.linalg.det(crystal.cell)) == pytest.approx(structure.volume, rel=1e-4)
    found = Structure(Lattice(crystal.cell), crystal.numbers, crystal.frac_coords)
    ours, theirs = (np.sort(s.distance_matrix, axis=None) for s in (found, structure))
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def with_group(text):
    return CIF.replace("loop_", text + "\nloop_", 1)


def test_space_group_without_operations():
    body_centred = with_group("_symmetry_space_group_name_H-M 'I 4/m m m'")
    assert len(CifText(body_centred).crystal().numbers) == 6
    number = with_group("_symmetry_Int_Tables_number 139")
    assert len(CifText(number).crystal().numbers) == 6
    # Operations that are listed count more than a name.
    listed = with_group("_symmetry_space_group_name_H-M 'I 4/m m m'\n_symmetry_equiv_pos_as_xyz 'x,y,z'")
    assert len(CifText(listed).crystal().numbers) == 2
    for text, message in [
        ("_symmetry_space_group_name_H-M 'F d -3 m'", "two origins"),
        ("_symmetry_space_group_name_H-M 'X 9 z'", "unknown"),
        ("_symmetry_space_group_name_H-M 'F m -3 m'", "cannot have"),
        ("_symmetry_equiv_pos_as_xyz 'x,y'", "symmetry operations are unreadable"),
    ]:
        with pytest.raises(RecordError, match=message) as caught:
            CifText(with_group(text)).crystal()
        assert caught.value.reason == "unreadable_cif"


def test_elements_come_from_types_or_labels():
    no_types = CIF.replace("_atom_site_type_symbol\n", "").replace("Na+ ", "").replace("Cl- ", "")
    assert CifText(no_types).crystal().numbers.tolist() == [11, 17]
    heavy_water = CIF.replace("Na+", "D").replace("Cl-", "O2-")
    assert CifText(heavy_water).crystal().numbers.tolist() == [1, 8]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.zip", b"PK\x03\x04 and no more", "a.zip cannot be read"),
        (
            "a.csv.gz",
            gzip.compress(b"material_id,cif\n" + os.urandom(4000).hex().encode())[:-2000],
            "a.csv.gz",
        ),
        ("a.tar.gz", "truncated tar", "a.tar.gz cannot be read"),
        ("a.db", b"SQLite format 3\0" + b"x" * 4096, "a.db is a damaged database"),
        ("a.json", b"[{]", "a.json is no valid JSON"),
        ("a.json", b'[{"x": 1}]', "a.json is a list whose items have the keys"),
        ("a.csv", b"material_id,gap\n1,2\n", "a.csv has no column 'cif'; its columns are material_id, gap"),
        ("a.csv", b"cif\n", "a.csv holds no record"),
        ("notes.txt", b"hello", "unknown format; name one of cif, csv"),
        ("a.zip", None, "a.zip does not exist"),
    ],
)
def test_an_unreadable_input_is_named(tmp_path, name, content, message):
    if content == "truncated tar":
        tarred(tmp_path / name, {f"{i}.cif": CIF + os.urandom(500).hex() for i in range(9)})
        content = (tmp_path / name).read_bytes()[:-1500]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PrepareError, match=message):
        prepare(tmp_path / name, tmp_path / "dataset", workers=0)
    assert not (tmp_path / "dataset").exists()


def test_a_missing_input_is_noticed_before_anything_is_read(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(PrepareError, match=r"b\.cif does not exist"):
        prepare([tmp_path / "a.zip", tmp_path / "b.cif"], tmp_path / "dataset")


def test_format_by_name(tmp_path):
    (tmp_path / "salt.txt").write_text(POSCAR)
    read(tmp_path / "salt.txt", tmp_path, format="poscar")
    with pytest.raises(PrepareError, match="format 'pdb' is unknown; choose one of cif"):
        prepare(tmp_path / "salt.txt", tmp_path / "other", format="pdb")
    (tmp_path / "list.txt").write_text(json.dumps(JARVIS))
    for layout in ("jarvis", "json"):
        read(tmp_path / "list.txt", tmp_path, format=layout, require_target="none")
    assert {"jarvis", "mp", "matbench", "atoms"} < set(FORMATS)


def test_a_damaged_member_of_an_archive_is_one_record(tmp_path):
    path = zipped(tmp_path / "in.zip", {"a.cif": CIF, "b.cif": CIF.replace("NaCl", "Salt"), "c.cif": CIF})
    content = path.read_bytes()
    path.write_bytes(content.replace(b"data_Salt", b"data_Selt"))  # its checksum is wrong now
    summary = prepare(path, tmp_path / "dataset", workers=0)
    assert (summary.read, summary.stored, summary.by_reason) == (3, 2, {"unreadable_file": 1})


def test_a_damaged_file_in_a_folder_does_not_stop_the_others(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("good", "last"):
        (folder / f"{name}.cif").write_text(CIF)
    rows = "material_id,cif\n" + f'x,"{CIF}"\n' + os.urandom(40000).hex()
    damaged = {
        "a.json": json.dumps(JARVIS).encode()[:-20],
        "b.zip": zipped(tmp_path / "b.zip", {"b.cif": CIF * 9}).read_bytes()[:-30],
        "c.pkl": pickle.dumps([("oqmd-1", CIF)])[:-20],
        "d.csv.gz": gzip.compress(rows.encode())[:-200],  # its first row is still whole
        "e.cif.gz": gzip.compress(os.urandom(9000))[:-200],
    }
    for name, content in damaged.items():
        (folder / name).write_bytes(content)
    summary = prepare(folder, tmp_path / "dataset", workers=0)
    assert summary.read == summary.stored + summary.rejected
    assert set(CrystalDataset.open(tmp_path / "dataset").ids) == {"good", "last", "x"}
    assert summary.by_reason == {"unreadable_file": len(damaged)}
    with (tmp_path / "dataset" / "rejects.csv").open(newline="") as file:
        rejects = {row["source"]: row["message"] for row in csv.DictReader(file)}
    assert sorted(rejects) == [f"{folder}/{name}" for name in damaged]
    assert all(source in message for source, message in rejects.items())
    for name in damaged:
        with pytest.raises(PrepareError, match=name):
            prepare(folder / name, tmp_path / "named", workers=0)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="third-party data is not here")
@pytest.mark.parametrize(
    ("name", "count", "target", "first"),
    [
        ("perov_5/test.csv.gz", 3785, "heat_all", None),
        ("carbon_24/test.csv.gz", 2030, "energy_per_atom", None),
        ("mp_20/test_part.csv.gz", 142, "formation_energy_per_atom", None),
        ("adsorption/O_small_full.zip", 1000, "target", None),
        ("matbench/data_phonons.json", 1265, "y", 98.58577122703691),
        ("matbench/data_exfoliation.json", 636, "y", 63.593833333333016),
    ],
)
def test_third_party_data(tmp_path, name, count, target, first):
    summary = prepare(SHARED_DATA / name, tmp_path / "dataset", targets=[target], workers=0)
    assert (summary.read, summary.stored) == (count, count)
    dataset = CrystalDataset.open(tmp_path / "dataset")
    assert np.isfinite(dataset.targets[target]).all()
    assert first is None or dataset.targets[target][0] == first


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="third-party data is not here")
@pytest.mark.parametrize("name", ["perov_5/test.csv.gz", "mp_20/test_part.csv.gz"])
def test_third_party_cifs_read_as_pymatgen_reads_them(name):
    from pymatgen.analysis.structure_matcher import StructureMatcher
    from pymatgen.core import Lattice, Structure

    records = Inputs([SHARED_DATA / name]).records()
    for _, record in zip(range(10), records, strict=False):
        crystal = record.payload.crystal()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pymatgen tells that it rounds coordinates
            expected = Structure.from_str(record.payload.text, fmt="cif")
        found = Structure(Lattice(crystal.cell), crystal.numbers, crystal.frac_coords)
        assert found.composition == expected.composition
        assert StructureMatcher(ltol=1e-4, stol=1e-3, scale=False).fit(found, expected)
