import json
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from small_datasets import TARGETS, random_crystals, write

from mgt_fast.data import CrystalDataset, DatasetError, DatasetWriter, Target
from mgt_fast.data.store import MANIFEST, record_batch


@pytest.fixture
def crystals():
    return random_crystals(20, np.random.default_rng(0))


@pytest.fixture
def folder(tmp_path, crystals):
    return write(tmp_path / "dataset", crystals)


def test_round_trip_in_any_order(folder, crystals):
    dataset = CrystalDataset.open(folder)
    assert len(dataset) == 20
    assert list(dataset.ids) == crystals["ids"]
    assert dataset.ids[-1] == crystals["ids"][-1]
    assert dataset.ids[6:9] == crystals["ids"][6:9]
    assert dataset.split.tolist() == crystals["split"]
    for name in ("train", "val", "test", ""):
        assert dataset.part(name).tolist() == np.flatnonzero(np.array(crystals["split"]) == name).tolist()
    assert dataset.num_atoms.tolist() == [len(numbers) for numbers in crystals["numbers"]]
    for name, values in crystals["targets"].items():
        np.testing.assert_array_equal(dataset.targets[name], values)
    assert dataset.target_info == TARGETS
    assert dataset.target_units == {"energy": "eV", "gap": "eV"}

    indices = np.array([19, 0, 7, 6, 7, 13, 14])
    batch = dataset.gather(indices)
    assert batch.ids == tuple(crystals["ids"][i] for i in indices)
    assert batch.num_atoms.tolist() == dataset.num_atoms[indices].tolist()
    np.testing.assert_array_equal(batch.numbers, np.concatenate([crystals["numbers"][i] for i in indices]))
    np.testing.assert_array_equal(
        batch.frac_coords, np.concatenate([crystals["frac_coords"][i] for i in indices])
    )
    np.testing.assert_array_equal(batch.cell, crystals["cell"][indices])
    np.testing.assert_array_equal(batch.pbc, crystals["pbc"][indices])
    dtypes = [t.dtype for t in (batch.numbers, batch.frac_coords, batch.cell, batch.batch_ptr, batch.pbc)]
    assert dtypes == [torch.int64, torch.float64, torch.float64, torch.int64, torch.bool]


def test_shards_are_plain_arrow_files_of_one_batch(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    assert [shard["crystals"] for shard in manifest["shards"]] == [7, 7, 6]
    for shard in manifest["shards"]:
        with pa.ipc.open_file(folder / shard["file"]) as reader:
            assert reader.num_record_batches == 1
            assert reader.get_batch(0).column("gap").null_count > 0


@pytest.mark.parametrize("names", [["test", "val"], ["val", "test", ""], ["val", "test", "val"]])
def test_parts_are_read_by_name_whatever_their_codes(folder, crystals, names):
    codes = np.random.default_rng(1).integers(0, len(names), 20).astype(np.int8)
    whole = record_batch(**crystals)
    shards = [
        whole.set_column(5, whole.schema.field("split"), pa.DictionaryArray.from_arrays(codes, order))
        for order in (names, names[::-1])
    ]
    dataset = CrystalDataset(folder, shards, TARGETS)
    expected = np.concatenate([np.array(order)[codes] for order in (names, names[::-1])])
    assert dataset.split.tolist() == expected.tolist()
    assert dataset.part("val").tolist() == np.flatnonzero(expected == "val").tolist()
    assert dataset.part("train").tolist() == []
    with pytest.raises(ValueError, match="part 'tests'; the parts are '', 'train', 'val', 'test'"):
        dataset.part("tests")


def test_a_single_shard_is_not_copied(tmp_path, crystals):
    dataset = CrystalDataset.open(write(tmp_path / "one", crystals, shard_size=20))
    assert dataset.split.tolist() == crystals["split"]
    assert not dataset._parts.flags.owndata
    assert (dataset._parts.dtype, dataset.num_atoms.dtype) == (np.int8, np.int32)


def test_targets_are_joined_when_asked_for(folder, crystals):
    dataset = CrystalDataset.open(folder)
    assert list(dataset.targets) == ["energy", "gap"]
    assert not dataset.targets._values
    assert dataset.targets["gap"] is dataset.targets["gap"]
    assert list(dataset.targets._values) == ["gap"]
    with pytest.raises(KeyError, match="density"):
        dataset.targets["density"]


def test_the_way_batches_arrive_does_not_matter(folder, crystals, tmp_path):
    whole = record_batch(**crystals)
    with DatasetWriter(tmp_path / "pieces", TARGETS, shard_size=7) as writer:
        for start in range(0, 20, 3):
            writer.write(whole.slice(start, 3))
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "pieces" / file.name).read_bytes(), file.name


def test_gather_refuses_what_is_not_there(folder):
    dataset = CrystalDataset.open(folder)
    assert len(dataset.gather([])) == 0
    with pytest.raises(ValueError, match="one dimension"):
        dataset.gather([[1, 2]])
    with pytest.raises(IndexError, match="of a dataset of 20"):
        dataset.gather(np.array([2**64 - 1], np.uint64))
    with pytest.raises(IndexError, match="crystal 20 of a dataset of 20"):
        dataset.gather([0, 20])
    with pytest.raises(IndexError, match="crystal -1"):
        dataset.gather([-1])
    with pytest.raises(TypeError, match="flatnonzero"):
        dataset.gather(dataset.split == "train")


def test_empty_dataset(tmp_path):
    with DatasetWriter(tmp_path / "empty", TARGETS):
        pass
    dataset = CrystalDataset.open(tmp_path / "empty")
    assert len(dataset) == 0
    assert list(dataset.ids) == []
    assert dataset.targets["gap"].shape == (0,)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def swap(file):
    other = file.with_name("shard-00000.arrow")
    content = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "named", "message"),
    [
        (flip_a_bit, "shard-00001.arrow", "SHA-256 differs"),
        (truncate, "shard-00001.arrow", "SHA-256 differs"),
        (swap, "shard-00000.arrow", "SHA-256 differs"),
        (lambda file: file.unlink(), "shard-00001.arrow", "is missing"),
    ],
)
def test_a_damaged_shard_is_named_and_refused(folder, damage, named, message):
    damage(folder / "shard-00001.arrow")
    with pytest.raises(DatasetError, match=f"{named}.*{message}"):
        CrystalDataset.open(folder)


def test_without_hashing_truncated_and_wrong_shards_are_still_refused(folder):
    file = folder / "shard-00002.arrow"
    content = file.read_bytes()
    file.write_bytes((folder / "shard-00001.arrow").read_bytes())
    with pytest.raises(DatasetError, match=r"shard-00002\.arrow holds 7 crystals"):
        CrystalDataset.open(folder, verify=False)
    file.write_bytes(content[:-100])
    with pytest.raises(DatasetError, match=r"shard-00002\.arrow cannot be read"):
        CrystalDataset.open(folder, verify=False)


def as_version_1(manifest):
    del manifest["edge_counts"], manifest["sha256"]
    manifest["version"] = 1


def rewrite(folder, *changes):
    manifest = json.loads((folder / MANIFEST).read_text())
    for change in changes:
        change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=99), "version 99, this program reads 1 and 2"),
        (lambda m: m.update(version=True), "version True"),
        (lambda m: m.update(format="other"), "is not the manifest"),
        (lambda m: m.pop("format"), "is damaged"),
        (lambda m: m.pop("shards"), "is damaged.*expected the keys"),
        (lambda m: m["shards"][0].pop("sha256"), "is damaged"),
        (lambda m: m["shards"].reverse(), "SHA-256 differs"),
        (lambda m: m["targets"]["gap"].update(unit="Ha"), "SHA-256 differs"),
        (lambda m: m["targets"].update(other={}), "SHA-256 differs"),
        (lambda m: m.update(version=1), "is damaged.*expected the keys"),
    ],
)
def test_a_changed_manifest_is_refused(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(DatasetError, match=message):
        CrystalDataset.open(folder, verify=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["shards"][0].update(file="../secret.arrow"), "outside its folder"),
        (lambda m: m["targets"].update(other={}), "does not have the columns"),
        (lambda m: m["targets"].update(gap={"unit": 1}), "target 'gap'"),
        (lambda m: m.update(sha255=""), "is damaged.*expected the keys"),
        (lambda m: m["shards"][0].update(crystals="7"), "is damaged.*crystals is '7'"),
        (lambda m: m.update(crystals=21), "do not add up to 21"),
    ],
)
def test_an_older_manifest_without_a_hash_is_checked(folder, change, message):
    rewrite(folder, as_version_1)
    assert len(CrystalDataset.open(folder)) == 20
    rewrite(folder, change)
    with pytest.raises(DatasetError, match=message):
        CrystalDataset.open(folder)


def test_only_the_content_of_the_manifest_counts(folder):
    text = (folder / MANIFEST).read_text()
    for same in (text.replace("\n", "\r\n\t"), json.dumps(json.loads(text), ensure_ascii=True)):
        (folder / MANIFEST).write_text(same)
        assert len(CrystalDataset.open(folder)) == 20


def test_a_file_changed_while_it_is_open_leads_nowhere(folder):
    dataset = CrystalDataset.open(folder)
    file = folder / "shard-00000.arrow"
    content = file.read_bytes()
    offsets = dataset.num_atoms[:7].cumsum().astype(np.int32)
    at = content.index(offsets.tobytes())
    for wrong in (10**9, -5):
        damaged = bytearray(content)
        damaged[at : at + 4] = np.int32(wrong).tobytes()
        with file.open("r+b") as opened:
            opened.write(damaged)
        with pytest.raises(DatasetError, match="changed while it was open"):
            dataset.gather([1])


def test_ids_are_a_sequence_of_names(folder, crystals):
    batch = CrystalDataset.open(folder).gather([3, 19, 3])
    expected = tuple(crystals["ids"][i] for i in (3, 19, 3))
    assert (*batch.ids,) == expected
    assert (len(batch.ids), batch.ids[-1], batch.ids[1:]) == (3, expected[2], expected[1:])
    assert batch.ids == expected
    assert batch.ids == list(expected)
    assert expected == batch.ids
    assert batch.ids != expected[:2]
    assert batch.ids != "abc"
    assert ", ".join(batch.ids) == ", ".join(expected)
    assert pickle.loads(pickle.dumps(batch)).ids == expected


def test_what_is_no_dataset_is_refused(tmp_path, folder):
    with pytest.raises(DatasetError, match="is no dataset"):
        CrystalDataset.open(tmp_path)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(DatasetError, match="is damaged"):
        CrystalDataset.open(folder)


def test_a_failed_write_leaves_nothing_behind(tmp_path, folder, crystals):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(AttributeError), DatasetWriter(folder, TARGETS, overwrite=True) as writer:
        [writer.write(batch) for batch in (record_batch(**crystals), None)]
    assert sorted(tmp_path.iterdir()) == before
    assert len(CrystalDataset.open(folder)) == 20


def test_an_existing_folder_is_kept_unless_asked(tmp_path, folder, crystals):
    with pytest.raises(DatasetError, match="exists already"):
        write(folder, crystals)
    write(folder, random_crystals(3, np.random.default_rng(1)), overwrite=True)
    assert len(CrystalDataset.open(folder)) == 3
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(DatasetError, match="is no dataset"):
        write(folder, crystals, overwrite=True)
    assert (folder / "thesis.tex").exists()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_target_cannot_hide_a_structure_column(tmp_path):
    with pytest.raises(DatasetError, match="target 'cell'"):
        DatasetWriter(tmp_path / "d", {"cell": Target()})
