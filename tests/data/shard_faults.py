"""Damage done to a dataset at random, and what became of it: each fault is detected before a crystal is used.

`python tests/data/shard_faults.py FOLDER COUNT` tries faults in FOLDER until COUNT of them did damage (some
edits of a manifest and some bytes say the same as before), and prints a line of JSON for each before it is
tried and after. It runs apart from the tests, so that a fault that kills the process or hangs it is seen.
"""

import json
import resource
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from small_datasets import lattices, write

from mgt_fast.data import CrystalDataset, DatasetError
from mgt_fast.data.counts import count_edges, edge_counts
from mgt_fast.data.store import MANIFEST
from mgt_fast.graph import SHELL_TOLERANCE

MAX_NEIGHBORS = 5
SHARDS = tuple(f"shard-{s:05d}.arrow" for s in range(4))
COUNTS = f"edges-{MAX_NEIGHBORS}.arrow"
FILES = (*SHARDS, COUNTS, MANIFEST)


def make(folder, seed, shard_size=6):
    """A dataset of 24 crystals in four shards, with counts."""
    crystals = lattices(24, np.random.default_rng(seed))
    plain = CrystalDataset.open(write(folder / "plain", crystals, shard_size))
    counts = {(MAX_NEIGHBORS, SHELL_TOLERANCE): count_edges(plain, MAX_NEIGHBORS)}
    write(folder / "dataset", crystals, shard_size, counts)
    shutil.rmtree(folder / "plain")
    return folder / "dataset"


def place(content, rng):
    """A position in a file: anywhere, or where Arrow's own notes stand, at its head and its foot."""
    near = rng.choice(["anywhere", "head", "foot"])
    low = max(0, len(content) - 3000) if near == "foot" else 0
    high = min(3000, len(content)) if near == "head" else len(content)
    return int(rng.integers(low, high))


def flip_a_bit(folder, other, rng):
    file = folder / rng.choice(FILES)
    content = bytearray(file.read_bytes())
    content[place(content, rng)] ^= 1 << rng.integers(8)
    file.write_bytes(content)


def overwrite_a_byte(folder, other, rng):
    file = folder / rng.choice(FILES)
    content = bytearray(file.read_bytes())
    content[place(content, rng)] = rng.integers(256)
    file.write_bytes(content)


def overwrite_a_number(folder, other, rng):
    """What offsets, lengths and counts are made of: four or eight bytes."""
    file = folder / rng.choice(FILES[:-1])
    content = bytearray(file.read_bytes())
    size = int(rng.choice([4, 8]))
    at = place(content, rng) // size * size
    value = int(rng.choice([-1, 0, 1, 2**31 - 1, -(2**31), rng.integers(-(2**31), 2**31), 3, 1000]))
    content[at : at + size] = value.to_bytes(size, "little", signed=True)
    file.write_bytes(content[: file.stat().st_size])


def lose_a_page(folder, other, rng):
    file = folder / rng.choice(FILES)
    content = bytearray(file.read_bytes())
    at = int(rng.integers(len(content)))
    end = min(at + int(rng.choice([64, 512, 4096])), len(content))
    content[at:end] = bytes(end - at)
    file.write_bytes(content)


def truncate(folder, other, rng):
    file = folder / rng.choice(FILES)
    content = file.read_bytes()
    file.write_bytes(content[: rng.choice([0, 8, rng.integers(len(content)), len(content) - 1])])


def append(folder, other, rng):
    file = folder / rng.choice(FILES)
    content = file.read_bytes()
    more = [b"\0", b" ", b"}", b"\n\t", rng.bytes(int(rng.integers(1, 5000))), content]
    file.write_bytes(content + more[rng.integers(len(more))])


def swap_two_shards(folder, other, rng):
    first, second = (folder / name for name in rng.choice(SHARDS, 2, replace=False))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def repeat_a_shard(folder, other, rng):
    first, second = (folder / name for name in rng.choice(SHARDS, 2, replace=False))
    first.write_bytes(second.read_bytes())


def take_a_file_of_another_dataset(folder, other, rng):
    name = rng.choice(FILES)
    (folder / name).write_bytes((other / name).read_bytes())


def delete_a_file(folder, other, rng):
    (folder / rng.choice(FILES)).unlink()


def change_the_manifest(folder, other, rng):
    """Edits by hand, with JSON that stays valid: some say the same in other words."""
    file = folder / MANIFEST
    manifest = json.loads(file.read_text())
    entries = [manifest, *manifest["shards"], *manifest["edge_counts"], *manifest["targets"].values()]
    entry = entries[rng.integers(len(entries))]
    key = str(rng.choice(sorted(entry)))
    edits = ["drop", "rename", "replace", "add", "indent", "order of keys", "escapes", "order", "move"]
    match rng.choice(edits):
        case "drop":
            del entry[key]
        case "rename":
            entry[key + "s"] = entry.pop(key)
        case "replace":
            old = entry[key]
            twice = old * 2 if isinstance(old, int | str) else 7
            others = [None, 0, "", [], {}, -1, 1.5, True, "x" * 64, twice]
            entry[key] = others[rng.integers(len(others))]
        case "add":
            entry["comment"] = "hello"
        case "indent":
            return file.write_text(json.dumps(manifest, indent=int(rng.integers(1, 9))))
        case "order of keys":
            keys = rng.permutation(list(manifest)).tolist()
            return file.write_text(json.dumps({name: manifest[name] for name in keys}))
        case "escapes":
            return file.write_text(json.dumps(manifest, ensure_ascii=True) + "\n\t ")
        case "order":
            manifest["shards"] = [manifest["shards"][i] for i in rng.permutation(4)]
        case "move":
            entry[key], manifest["format"] = manifest["format"], entry[key]
    return file.write_text(json.dumps(manifest, indent=2))


def use_stale_counts(folder, other, rng):
    """The counts of other crystals, or of other graphs, under the name of the right ones."""
    file = folder / COUNTS
    counts = edge_counts(CrystalDataset.open(folder), MAX_NEIGHBORS)
    counts = [np.roll(counts, 1), counts + 2, counts[::-1], counts[:-1], np.zeros_like(counts)][
        rng.integers(5)
    ]
    crystals = lattices(24, np.random.default_rng(0))
    stale = write(folder.parent / "stale", crystals, edge_counts={(MAX_NEIGHBORS, SHELL_TOLERANCE): counts})
    file.write_bytes((stale / COUNTS).read_bytes())
    shutil.rmtree(stale)


FAULTS = (
    flip_a_bit,
    flip_a_bit,
    flip_a_bit,
    overwrite_a_byte,
    overwrite_a_number,
    overwrite_a_number,
    lose_a_page,
    truncate,
    append,
    swap_two_shards,
    repeat_a_shard,
    take_a_file_of_another_dataset,
    delete_a_file,
    change_the_manifest,
    change_the_manifest,
    use_stale_counts,
)


def contents(dataset):
    """All that a dataset tells."""
    batch = dataset.gather(np.arange(len(dataset)))
    tensors = [batch.numbers, batch.frac_coords, batch.cell, batch.batch_ptr, batch.pbc]
    arrays = [tensor.numpy() for tensor in tensors] + [dataset.split, dataset.num_atoms]
    arrays += [dataset.targets[name] for name in dataset.targets] + [edge_counts(dataset, MAX_NEIGHBORS)]
    texts = [list(dataset.ids), list(batch.ids), dataset.target_info, list(dataset.targets)]
    return [array.tobytes() for array in arrays], texts


def says_the_same(folder, original):
    """Whether the damaged dataset has the original's bytes and a manifest that means the same."""
    try:
        return all(
            json.loads((folder / name).read_text()) == json.loads((original / name).read_text())
            if name == MANIFEST
            else (folder / name).read_bytes() == (original / name).read_bytes()
            for name in FILES
        )
    except (OSError, ValueError):
        return False


def attempt(folder, verify):
    """Open a dataset and use all of it: ("opened", contents), or ("refused", message)."""
    try:
        dataset = CrystalDataset.open(folder, verify=verify)
    except DatasetError as error:
        return "refused", str(error)
    found = contents(dataset)
    count_edges(dataset, MAX_NEIGHBORS)
    return "opened", found


def try_fault(number, work, original, other):
    """Return what became of a fault, and whether it was as it must be."""
    rng = np.random.default_rng((2026, number))
    fault = FAULTS[number % len(FAULTS)]
    folder = work / "dataset"
    shutil.copytree(original, folder)
    fault(folder, other, rng)
    harmless = says_the_same(folder, original)
    expected = contents(CrystalDataset.open(original))
    started = time.perf_counter()
    verified, found = attempt(folder, verify=True)
    unverified, _ = attempt(folder, verify=False)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    if harmless:
        right = verified == "opened" and found == expected
    else:
        remedy = any(word in found for word in ("restore it", "prepare", "name another folder"))
        right = verified == "refused" and str(folder) in found and remedy
    return {
        "number": number,
        "fault": fault.__name__,
        "harmless": harmless,
        "verified": verified,
        "unverified": unverified,
        "right": bool(right),
        "message": found if verified == "refused" else "",
        "seconds": seconds,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main(work, count):
    torch.set_num_threads(1)
    work = Path(work)
    original, other = make(work / "original", 0), make(work / "other", 1)
    number = damaged = 0
    while damaged < int(count):
        say({"trying": number})
        outcome = try_fault(number, work, original, other)
        say(outcome)
        number += 1
        damaged += not outcome["harmless"]


def say(line):
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
