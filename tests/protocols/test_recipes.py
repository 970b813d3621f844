"""Every packaged recipe prepares crystals from files of the layout that it names."""

import gzip
import json
import pickle
import tarfile
import zipfile

import pytest
import torch
from test_prepare import QUIET, item

from mgt_fast.data import CrystalDataset
from mgt_fast.protocols.prepare import prepare_protocol
from mgt_fast.protocols.recipe import ByFiles, ByFolds, ByIds, load_recipes

COUNT = 10
SIZES = (6, 2, 2)
CIF = """data_toy
_cell_length_a {a}
_cell_length_b 4
_cell_length_c 4
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
Na1 Na 0 0 0
Cl1 Cl 0.5 0.5 0.5
"""
POSCAR = "toy\n1.0\n{a} 0 0\n0 4 0\n0 0 20\nPt O\n1 1\nDirect\n0 0 0\n0 0 0.1\n"


def small(recipe, source):
    """The recipe with this source alone, for ten crystals; checksums are those of the real files."""
    files = [file.model_copy(update={"sha256": None}) for file in source.files]
    return recipe.model_copy(
        update={
            "sizes": SIZES if recipe.sizes else None,
            "sources": (source.model_copy(update={"files": tuple(files)}),),
        }
    )


def names_of(recipe, source):
    """Official names and those in the files, of crystals 1 to COUNT."""
    numbers = range(1, COUNT + 1)
    if source.ids is None:
        own = [f"crystal-{i}" for i in numbers]
        return own, own
    own = [source.ids.pattern.replace(r"(\d+)", str(i)) for i in numbers]
    return [source.ids(name) for name in own], own


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


def write_structures(raw, source, own, text, ending):
    files = {f"set/{name}{ending}": text.format(a=4 + i / 100) for i, name in enumerate(own)}
    write_zip(raw / source.files[0].name, files)
    rows = [f"{name}{ending},{i / 10}" for i, name in enumerate(own)]
    (raw / source.labels.name).write_text("\n".join(rows))


def write_raw(raw, recipe, source, own):
    """Write raw files of the source's layout."""
    items = [item(i, None) | {"jid": name, source.column: i / 10} for i, name in enumerate(own)]
    first = source.files[0].name
    if source.format == "jarvis":
        if not isinstance(recipe.split, ByIds):
            items.append(item(COUNT, None) | {"jid": "without", source.column: "na"})
        write_zip(raw / first, {first.removesuffix(".zip"): json.dumps(items)})
    elif source.format == "mp":
        structures = [
            {"material_id": name, "structure": CIF.format(a=4 + i / 100), source.column: i / 10}
            for i, name in enumerate(own)
        ]
        write_zip(raw / first, {first.removesuffix(".zip"): json.dumps(structures)})
    elif source.format == "tensor-pickle":
        for one in items:
            one[source.column] = torch.tensor(one[source.column])
        bounds = (0, SIZES[0], SIZES[0] + SIZES[1], COUNT)
        for file, begin, end in zip(source.files, bounds, bounds[1:], strict=False):
            (raw / file.name).write_bytes(pickle.dumps(items[begin:end]))
    elif source.format == "matbench":
        lattice = {"matrix": [[4, 0, 0], [0, 4, 0], [0, 0, 4]]}
        sites = [
            {"species": [{"element": element, "occu": 1}], "abc": [x, x, x]}
            for element, x in (("Na", 0.0), ("Cl", 0.5))
        ]
        rows = [[{"lattice": lattice, "sites": sites}, i / 10] for i in range(COUNT)]
        table = {"index": list(range(COUNT)), "columns": ["structure", source.column], "data": rows}
        (raw / first).write_bytes(gzip.compress(json.dumps(table).encode()))
    elif source.format == "atoms":
        atoms = {"positions": [[0, 0, 0], [2, 2, 2]], "cell": [[4, 0, 0], [0, 4, 0], [0, 0, 4]]}
        rows = [
            {"structure_id": name, **atoms, "atomic_numbers": [11, 17], source.column: [i / 10]}
            for i, name in enumerate(own)
        ]
        (raw / first).write_text(json.dumps(rows))
    elif source.labels is not None and source.ids is not None:
        write_structures(raw, source, own, POSCAR, ".vasp")
    elif source.labels is not None:
        write_structures(raw, source, own, CIF, ".cif")
    elif source.format == "crystallm":
        for number, file in enumerate(source.files):
            pairs = [(f"{name}-{number}", CIF.format(a=4 + i / 100)) for i, name in enumerate(own)]
            (raw / file.name).write_bytes(gzip.compress(pickle.dumps(pairs)))
    else:
        write_gmae(raw / first, own, source.column)


def write_gmae(path, own, column):
    """Graphs as PyTorch Geometric pickles them, in an LMDB database in an archive."""
    lmdb = pytest.importorskip("lmdb")
    folder = path.with_suffix(".lmdb")
    with lmdb.open(str(folder), subdir=False, map_size=2**20) as env, env.begin(write=True) as writer:
        for i, name in enumerate(own):
            values = {
                "gmae_pos": torch.tensor([[0.0, 0, 0], [0, 0, 2]]),
                "gmae_atom_numb": torch.tensor([78.0, 8.0]),
                "cell": torch.diag(torch.tensor([4.0 + i / 100, 4, 20]))[None],
                "sid": name,
                column: i / 10,
            }
            # A global that only PyTorch Geometric has, made by its name and filled by BUILD.
            state = pickle.dumps(values, protocol=2)[2:-1]
            data = b"\x80\x02ctorch_geometric.data.data\nData\n)\x81" + state + b"b."
            writer.put(str(i).encode(), data)
        writer.put(b"length", pickle.dumps(len(own)))
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, f"{path.name.removesuffix('.tar.gz')}/data.lmdb")


SOURCES = [(one, number) for one in load_recipes().values() for number in range(len(one.sources))]


@pytest.mark.parametrize(("whole", "number"), SOURCES, ids=[f"{one.name}-{n}" for one, n in SOURCES])
def test_a_recipe_reads_the_layout_that_it_names(tmp_path, whole, number):
    recipe = small(whole, whole.sources[number])
    source = recipe.sources[0]
    official, own = names_of(recipe, source)
    raw = tmp_path / "raw"
    raw.mkdir()
    write_raw(raw, recipe, source, own)
    if isinstance(recipe.split, ByIds):
        parts = {"train": official[:6], "val": official[6:8], "test": official[8:]}
        file = raw / recipe.split.file.name
        write_zip(file, {file.name.removesuffix(".zip"): json.dumps(parts)})
    found, summary = prepare_protocol(recipe, tmp_path / "out", raw, QUIET, workers=0)
    assert summary.rejected == 0
    dataset = CrystalDataset.open(found.dataset_path)
    if recipe.target is None:
        assert len(dataset) == 3 * COUNT
        return
    if source.format == "matbench":
        official = list(dataset.ids)
        assert official[0] == f"mb-{recipe.name.removeprefix('matbench_')}-01"
    stored = dict(zip(dataset.ids, dataset.targets[recipe.target], strict=True))
    assert [stored[name] for name in official] == pytest.approx([i / 10 for i in range(COUNT)])
    assert dataset.target_units[recipe.target] == recipe.unit
    for fold in range(recipe.num_folds):
        parts = json.loads(found.split_file(fold).read_text())
        assert sorted(name for ids in parts.values() for name in ids) == sorted(official)
        if not isinstance(recipe.split, ByFolds):
            by_fractions = recipe.sizes is None and not isinstance(recipe.split, ByIds)
            assert found.sizes == ((8, 1, 1) if by_fractions else SIZES,)
    if isinstance(recipe.split, ByFiles):
        assert parts["train"] == official[: SIZES[0]]
