"""The manifest of a dataset: which files it consists of, and the hashes that guard them.

    key          meaning
    format       "mgt-fast dataset"
    version      2; 1, without the last two keys, is read as well
    targets      name -> {unit, description}, in the order of the columns
    crystals     number of crystals
    atoms        number of atoms
    shards       [{file, sha256, crystals, atoms}], in the order of the crystals
    edge_counts  [{file, sha256, max_neighbors, shell_tolerance}]; see `counts`
    sha256       of the manifest itself, without this key, as JSON with sorted keys and no spaces

Other keys, and other keys in an entry, count as damage: a misspelt one would hide what it stood for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FORMAT = "mgt-fast dataset"
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
RESTORE = "restore it from a copy or prepare the dataset again"

_KEYS_1 = {"format": str, "version": int, "targets": dict, "crystals": int, "atoms": int, "shards": list}
_KEYS = {1: _KEYS_1, 2: {**_KEYS_1, "edge_counts": list, "sha256": str}}
_SHARD_KEYS = {"file": str, "sha256": str, "crystals": int, "atoms": int}
_COUNTS_KEYS = {"file": str, "sha256": str, "max_neighbors": int, "shell_tolerance": float}


class DatasetError(ValueError):
    """A dataset that cannot be read or written; the message names the file and the remedy."""


@dataclass(frozen=True)
class Target:
    """What a target column holds."""

    unit: str = ""
    description: str = ""


def write_manifest(
    folder: Path, targets: Mapping[str, Target], shards: Sequence[dict], edge_counts: Sequence[dict]
) -> None:
    """Write the manifest of a dataset whose other files stand in `folder`."""
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "targets": {name: vars(target) for name, target in targets.items()},
        "crystals": sum(shard["crystals"] for shard in shards),
        "atoms": sum(shard["atoms"] for shard in shards),
        "shards": list(shards),
        "edge_counts": list(edge_counts),
    }
    manifest["sha256"] = _content_hash(manifest)
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> dict:
    """Read and check the manifest of the dataset in `folder`.

    Returns:
        The manifest; `targets` holds Targets, `edge_counts` is there for version 1 as well.

    Raises:
        DatasetError: if there is none, it is damaged, or it is of another version.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise DatasetError(f"{folder} is no dataset: it has no {MANIFEST}; make one with `mgt-fast prepare`")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise DatasetError(f"{file} is not the manifest of an {FORMAT}; name another folder")
        version = manifest.get("version")
        if isinstance(version, bool) or version not in _KEYS:
            raise DatasetError(
                f"{file} has format version {version!s:.50}, this program reads 1 and 2; "
                "prepare the dataset again"
            )
        _check_keys(manifest, _KEYS[version])
        if version > 1 and manifest["sha256"] != _content_hash(manifest):
            raise _Damage("its SHA-256 differs")
        manifest.setdefault("edge_counts", [])
        for entries, keys in (("shards", _SHARD_KEYS), ("edge_counts", _COUNTS_KEYS)):
            for entry in manifest[entries]:
                _check_keys(entry, keys)
                if Path(entry["file"]).name != entry["file"] or "\0" in entry["file"]:
                    raise _Damage(f"it names a file outside its folder, {entry['file']!r}")
        for key in ("crystals", "atoms"):
            if manifest[key] != sum(shard[key] for shard in manifest["shards"]):
                raise _Damage(f"the {key} of its shards do not add up to {manifest[key]}")
        for name, info in manifest["targets"].items():
            if not (isinstance(info, dict) and all(isinstance(text, str) for text in info.values())):
                raise _Damage(f"target {name!r} is {info!r}")
        manifest["targets"] = {name: Target(**info) for name, info in manifest["targets"].items()}
    except DatasetError:
        raise
    except (_Damage, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = str(error) if isinstance(error, _Damage) else f"{type(error).__name__}: {error}"
        raise DatasetError(f"{file} is damaged ({why}); {RESTORE}") from error
    return manifest


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(folder: Path, entries: Sequence[dict], verify: bool) -> None:
    """Raise DatasetError for the first file of a manifest that is missing or, with `verify`, another one."""
    for entry in entries:
        if not (folder / entry["file"]).is_file():
            raise DatasetError(f"{folder / entry['file']} is missing; {RESTORE}")
    if not verify:
        return
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # hashing releases the GIL
        hashes = pool.map(lambda entry: hash_file(folder / entry["file"]), entries)
        for entry, found in zip(entries, hashes, strict=True):
            if found != entry["sha256"]:
                raise DatasetError(
                    f"{folder / entry['file']} is damaged or another file: its SHA-256 differs; {RESTORE}"
                )


class _Damage(Exception):  # noqa: N818 - a reason, on its way to becoming a DatasetError
    pass


def _content_hash(manifest: Mapping) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_keys(entry: object, keys: Mapping[str, type]) -> None:
    if not isinstance(entry, dict) or entry.keys() != keys.keys():
        found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise _Damage(f"expected the keys {', '.join(keys)}, found {found}")
    for key, kind in keys.items():
        if type(entry[key]) is not kind:
            raise _Damage(f"{key} is {entry[key]!r:.100}")
