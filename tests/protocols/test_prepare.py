"""From raw files to a dataset and its folds; stand-ins of the clients leave what the real ones leave."""

import csv
import json
import sys
import threading
import types
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from rich.console import Console
from test_cli import invoke

from mgt_fast.data import CrystalDataset
from mgt_fast.data.manifest import hash_file
from mgt_fast.protocols.prepare import Prepared, prepare_protocol
from mgt_fast.protocols.recipe import Recipe, RecipeError, as_overrides, find_recipe, load_recipes
from mgt_fast.train.config import FinetuneConfig, load_config

QUIET = Console(quiet=True)


def item(number, value, **more):
    """A crystal as JARVIS stores it."""
    atoms = {
        "lattice_mat": [[4.0 + 0.01 * number, 0, 0], [0, 4, 0], [0, 0, 4]],
        "coords": [[0, 0, 0], [0.5, 0.5, 0.5]],
        "elements": ["Na", "Cl"],
        "cartesian": False,
    }
    return {"jid": f"J-{number}", "atoms": atoms, "energy": value, **more}


def recipe(**changes):
    fields = {
        "name": "toy",
        "title": "A toy",
        "target": "e",
        "unit": "eV",
        "sources": [{"files": [{"name": "toy.json"}], "format": "jarvis", "column": "energy"}],
        "split": {"rule": "shuffle", "fractions": [0.6, 0.2, 0.2]},
    }
    return Recipe(**(fields | changes))


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    items = [item(i, "na" if i == 3 else float(i)) for i in range(16)]
    (folder / "toy.json").write_text(json.dumps(items))
    return folder


def prepared(recipe, tmp_path, raw, **options):
    return prepare_protocol(recipe, tmp_path / "toy", raw, QUIET, workers=0, **options)


def parts_of(found, fold=0):
    return json.loads(found.split_file(fold).read_text())


def test_crystals_without_the_target_are_stored_and_in_no_part(tmp_path, raw):
    found, summary = prepared(recipe(), tmp_path, raw)
    assert (summary.read, summary.stored, summary.targets["e"]) == (16, 16, 15)
    assert found.sizes == ((9, 3, 3),)
    named = [name for ids in parts_of(found).values() for name in ids]
    assert sorted(named) == sorted(f"J-{i}" for i in range(16) if i != 3)
    dataset = CrystalDataset.open(found.dataset_path)
    assert np.isnan(dataset.targets["e"][list(dataset.ids).index("J-3")])
    assert dataset.target_units["e"] == "eV"
    assert found.files == (("toy.json", hash_file(raw / "toy.json")),)
    assert Prepared.open(tmp_path / "toy", recipe()) == found


def test_the_order_of_the_file_counts_and_not_that_of_the_stored(tmp_path, raw):
    items = json.loads((raw / "toy.json").read_text())
    items[7]["atoms"]["elements"] = ["Na", "Qq"]  # cannot be stored
    whole, _ = prepared(recipe(), tmp_path, raw)
    before = parts_of(whole)
    (raw / "toy.json").write_text(json.dumps(items))
    with pytest.raises(RecipeError, match=r"1 of the 15 ids .* \(J-7\); .*rejects\.csv.*--allow-missing"):
        prepared(recipe(), tmp_path, raw, overwrite=True)
    found, summary = prepared(recipe(), tmp_path, raw, overwrite=True, allow_missing=True)
    assert summary.by_reason == {"unknown_element": 1}
    assert found.missing == ("J-7",)
    assert parts_of(found) == {part: [i for i in ids if i != "J-7"] for part, ids in before.items()}
    assert any("J-7" in line for line in found.lines())


def test_ids_of_a_file_may_name_a_crystal_twice_and_none_that_is_not_there(tmp_path, raw):
    ids = {"train": ["J-0", "J-1", "J-2"], "val": ["J-2", "J-4"], "test": ["J-5"]}
    (raw / "ids.json").write_text(json.dumps(ids))
    by_ids = recipe(split={"rule": "ids", "file": {"name": "ids.json"}}, sizes=(3, 2, 1))
    found, _ = prepared(by_ids, tmp_path, raw)
    assert parts_of(found) == {"train": ["J-0", "J-1"], "val": ["J-2", "J-4"], "test": ["J-5"]}
    assert found.repeated == ("J-2",)
    (raw / "ids.json").write_text(json.dumps(ids | {"test": ["J-99"]}))
    with pytest.raises(RecipeError, match=r"1 of the 5 ids .* \(J-99\)"):
        prepared(by_ids, tmp_path, raw, overwrite=True)
    (raw / "ids.json").write_text(json.dumps({"train": ["J-0"]}))
    with pytest.raises(RecipeError, match=r"ids\.json is no id file"):
        prepared(by_ids, tmp_path, raw, overwrite=True)


def test_other_sizes_than_the_official_ones_are_an_error(tmp_path, raw):
    (raw / "ids.json").write_text(json.dumps({"train": ["J-0"], "val": ["J-1"], "test": ["J-2"]}))
    wrong = recipe(split={"rule": "ids", "file": {"name": "ids.json"}}, sizes=(2, 1, 1))
    with pytest.raises(RecipeError, match=r"\(2, 1, 1\) crystals .* give \(1, 1, 1\)"):
        prepared(wrong, tmp_path, raw)
    with pytest.raises(RecipeError, match="15 crystals have the target, and the split needs 16"):
        prepared(recipe(split={"rule": "shuffle"}, sizes=(14, 1, 1)), tmp_path, raw, overwrite=True)


def test_every_part_may_have_a_file_of_its_own(tmp_path, raw):
    for part, numbers in {"train": (0, 1), "val": (2,), "test": (5,)}.items():
        (raw / f"{part}.json").write_text(json.dumps([item(i, 1.0 + i) for i in numbers]))
    files = [{"name": f"{part}.json"} for part in ("train", "val", "test")]
    by_file = recipe(
        sources=[{"files": files, "format": "jarvis", "column": "energy"}],
        split={"rule": "files", "train": "train.json", "val": "val.json", "test": "test.json"},
    )
    found, summary = prepared(by_file, tmp_path, raw)
    assert summary.stored == 4
    assert parts_of(found) == {"train": ["J-0", "J-1"], "val": ["J-2"], "test": ["J-5"]}


def test_names_of_a_file_become_the_official_ones(tmp_path, raw):
    source = {"files": [{"name": "toy.json"}], "format": "jarvis", "column": "energy"}
    renamed = recipe(sources=[source | {"ids": {"pattern": r"J-(\d+)", "template": "off-{:03d}", "plus": 1}}])
    found, _ = prepared(renamed, tmp_path, raw)
    assert CrystalDataset.open(found.dataset_path).ids[15] == "off-016"
    assert all(name.startswith("off-") for name in parts_of(found)["train"])
    wrong = recipe(sources=[source | {"ids": {"pattern": r"K-(\d+)", "template": "{}"}}])
    with pytest.raises(RecipeError, match="'J-0' is not named as"):
        prepared(wrong, tmp_path, raw, overwrite=True)


def test_a_source_that_is_there_is_taken_before_one_that_must_be_fetched(tmp_path, raw):
    sources = [
        {"files": [{"name": "official.zip", "url": "https://example.org"}], "column": "energy"},
        {"files": [{"name": "toy.json"}], "format": "jarvis", "column": "energy"},
    ]
    found, _ = prepared(recipe(sources=sources), tmp_path, raw)
    assert [name for name, _ in found.files] == ["toy.json"]


def test_a_file_that_nobody_fetches_is_asked_for(tmp_path, raw):
    (raw / "toy.json").unlink()
    source = {"files": [{"name": "toy.json", "note": "a table"}], "column": "energy"}
    with pytest.raises(RecipeError, match=r"put toy\.json \(a table\) into .*raw; no client can fetch it"):
        prepared(recipe(sources=[source]), tmp_path, raw)


def test_another_file_or_two_of_the_same_name_are_refused(tmp_path, raw):
    file = {"name": "toy.json", "sha256": "0" * 64}
    with pytest.raises(RecipeError, match=r"has SHA-256 .*, the official file 0000"):
        prepared(recipe(sources=[{"files": [file], "column": "energy"}]), tmp_path, raw)
    (raw / "copy").mkdir()
    (raw / "copy" / "toy.json").write_text("[]")
    with pytest.raises(RecipeError, match=r"holds toy\.json twice"):
        prepared(recipe(), tmp_path, raw)


def client_recipe(client):
    names = {"jarvis": "toy.json.zip", "matminer": "toy.json.gz"}
    file = {"name": names[client], "client": client, "key": "toy", "url": "https://example.org/toy"}
    return recipe(sources=[{"files": [file], "format": "jarvis", "column": "energy"}])


def stand_in(monkeypatch, module, **functions):
    """Put a module, with those above it, into the place of one that is not installed."""
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    for name, function in functions.items():
        setattr(sys.modules[module], name, function)


def test_jarvis_tools_fetches(tmp_path, raw, monkeypatch, capsys):
    content = (raw / "toy.json").read_text()
    (raw / "toy.json").unlink()

    def data(dataset, store_dir):
        assert dataset == "toy"
        sys.stdout.write("Obtaining the toy ...\n")
        with zipfile.ZipFile(f"{store_dir}/toy.json.zip", "w") as archive:
            archive.writestr("toy.json", content)

    stand_in(monkeypatch, "jarvis.db.figshare", data=data)
    found, summary = prepared(client_recipe("jarvis"), tmp_path, raw)
    assert summary.stored == 16
    assert sorted(path.name for path in raw.iterdir()) == ["toy.json.zip"]
    assert capsys.readouterr().out == ""
    stand_in(monkeypatch, "jarvis.db.figshare")  # it is there now and not fetched again
    again, _ = prepared(client_recipe("jarvis"), tmp_path, raw, overwrite=True)
    assert again == found


@pytest.mark.parametrize("announced", [0, 10])
def test_a_file_is_fetched_whole_from_its_address_or_not_at_all(tmp_path, raw, announced):
    """The server announces `announced` bytes more than it sends."""
    content = (raw / "toy.json").read_bytes()
    (raw / "toy.json").unlink()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content) + announced))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        file = {"name": "toy.json", "url": f"http://127.0.0.1:{server.server_port}/toy.json"}
        one = recipe(sources=[{"files": [file], "format": "jarvis", "column": "energy"}])
        if announced:
            with pytest.raises(
                RecipeError, match=r"toy\.json could not be fetched \(OSError: .* 10 bytes early"
            ):
                prepared(one, tmp_path, raw)
            assert list(raw.iterdir()) == []
        else:
            prepared(one, tmp_path, raw)
            assert (raw / "toy.json").read_bytes() == content


def test_what_a_client_cannot_fetch_may_be_put_there(tmp_path, raw, monkeypatch):
    def load_dataset(name, data_home):
        raise ConnectionError("no route to host")

    stand_in(monkeypatch, "matminer.datasets", load_dataset=load_dataset)
    by_hand = r"put toy\.json\.gz \(https://example\.org/toy\) into"
    with pytest.raises(RecipeError, match=rf"\(ConnectionError: no route to host\); {by_hand}"):
        prepared(client_recipe("matminer"), tmp_path, raw)
    stand_in(monkeypatch, "matminer.datasets", load_dataset=lambda name, data_home: None)
    with pytest.raises(RecipeError, match=rf"matminer left nothing instead of toy\.json\.gz; {by_hand}"):
        prepared(client_recipe("matminer"), tmp_path, raw)
    monkeypatch.setitem(sys.modules, "matminer.datasets", None)
    with pytest.raises(ImportError, match=rf"pip install 'mgt-fast\[science\]'; or {by_hand}"):
        prepared(client_recipe("matminer"), tmp_path, raw)
    assert [path.name for path in raw.iterdir()] == ["toy.json"]
    half = raw / ".fetching-0" / "toy.json.gz"  # of a fetch that was killed
    half.parent.mkdir()
    half.write_bytes(b"half a file")
    with pytest.raises(ImportError, match=by_hand):
        prepared(client_recipe("matminer"), tmp_path, raw)


def test_what_is_prepared_is_not_replaced_unasked(tmp_path, raw):
    prepared(recipe(), tmp_path, raw)
    with pytest.raises(RecipeError, match="is prepared already"):
        prepared(recipe(), tmp_path, raw)
    with pytest.raises(RecipeError, match="holds toy, not other"):
        Prepared.open(tmp_path / "toy", recipe(name="other"))
    with pytest.raises(RecipeError, match="mgt-fast protocol prepare toy -o"):
        Prepared.open(tmp_path, recipe())
    (tmp_path / "toy" / "prepared.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"prepared\.json is damaged"):
        Prepared.open(tmp_path / "toy", recipe())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": None}, "rule: none"),
        ({"sources": []}, "rule: own"),
        ({"sizes": (1, 1, 1)}, "either sizes or fractions"),
        ({"sources": [{"files": [{"name": "x"}]}]}, "column of the target"),
        ({"sources": [{"files": [{"name": "x", "client": "jarvis"}], "column": "c"}]}, "go together"),
        ({"unknown": 1}, "Extra inputs"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


def test_every_packaged_recipe_is_whole():
    recipes = load_recipes()
    for one in recipes.values():
        files = [file for source in one.sources for file in source.all_files]
        assert one.citation, one.name
        assert all(file.can_be_fetched or file.note for file in files), one.name
    assert find_recipe("matbench_phonons").num_folds == 5
    with pytest.raises(RecipeError, match="no protocol 'matbench_phonon'; choose one of bundled, "):
        find_recipe("matbench_phonon")


def test_list_and_show_tell_what_a_protocol_needs():
    listed = invoke("protocol", "list").output
    assert all(name in listed for name in load_recipes())
    shown = invoke("protocol", "show", "mp_bulk_modulus").output
    for text in (
        "bulk_megnet_test.pkl",
        "4,664 / 393 / 393",
        "target not scaled, batch 16, lr 0.0005",
        "MGT 0.0297",
    ):
        assert text in shown
    for name in load_recipes():
        invoke("protocol", "show", name)


def test_the_bundled_protocol_needs_no_files(tmp_path):
    result = invoke("protocol", "prepare", "bundled", "-o", tmp_path / "b", "--raw", tmp_path / "none")
    assert "train 3418, val 265, test 226 crystals" in result.output
    assert Prepared.open(tmp_path / "b", find_recipe("bundled")).dataset_path is None


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_agra_from_its_poscars(shared_data, tmp_path):
    agra = find_recipe("agra_o")
    found, summary = prepare_protocol(agra, tmp_path / "agra", shared_data, QUIET, workers=0)
    assert (summary.stored, summary.rejected) == (1000, 0)
    dataset = CrystalDataset.open(found.dataset_path)
    energies = dict(zip(dataset.ids, dataset.targets["adsorption_energy"], strict=True))
    for name, value in rows_of(shared_data / "adsorption" / "O_id_prop.csv"):
        assert energies[name.replace("POSCAR_O_", "agra_ORR_").removesuffix(".vasp")] == float(value)
    assert found.sizes == (agra.sizes,)


@pytest.mark.parametrize("name", ["phonons", "jdft2d"])
def test_matbench_from_lists_of_atoms(shared_data, tmp_path, name):
    one = find_recipe(f"matbench_{name}")
    found, summary = prepare_protocol(one, tmp_path / name, shared_data, QUIET, workers=0)
    assert summary.rejected == 0
    folds = json.loads((shared_data / "matbench" / "folds.json").read_text())["splits"][one.name]
    source = shared_data / "matbench" / one.sources[1].files[0].name
    rows = json.loads(source.read_text())
    dataset = CrystalDataset.open(found.dataset_path)
    assert list(dataset.ids) == sorted([*folds["fold_0"]["train"], *folds["fold_0"]["test"]])
    np.testing.assert_array_equal(dataset.targets[one.target], [row["y"][0] for row in rows])
    for number in range(5):
        parts, fold = parts_of(found, number), folds[f"fold_{number}"]
        assert parts["test"] == fold["test"]
        assert sorted([*parts["train"], *parts["val"]]) == sorted(fold["train"])
        assert len(parts["val"]) == len(fold["train"]) // 10


@pytest.mark.parametrize("one", load_recipes().values(), ids=lambda one: one.name)
def test_the_settings_of_every_recipe_are_valid(one):
    for variant in one.variants:
        load_config(FinetuneConfig, None, as_overrides(one.variant(variant)))
