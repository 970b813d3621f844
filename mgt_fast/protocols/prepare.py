"""From a recipe to a dataset and its folds.

`prepare_protocol` leaves in a folder of its own

    dataset/       the crystals, a prepared dataset
    fold-0.json    ids of the train, val and test crystals, for `data.split_file`; one file a fold
    prepared.json  what was prepared from what; it is written last
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from ..data import CrystalDataset, PrepareSummary, prepare
from ..data.manifest import hash_file
from ..data.readers.base import target_value
from ..data.readers.inputs import Inputs, read_text
from ..durable import make_folder, replace_file
from ..train.batches import PARTS, target_values
from ..train.runlog import say
from ..train.setup import manifest_digest
from .fetch import choose_source, obtain
from .recipe import ByFiles, ByFolds, ByIds, ByShuffle, NoSplit, Own, Recipe, RecipeError, Source
from .splits import Parts, fraction_sizes, hold_out, k_folds, shuffled

DATASET, PREPARED = "dataset", "prepared.json"
_SHOWN = 10  # ids in a message


@dataclass(frozen=True)
class Prepared:
    """A protocol that is ready to run.

    Attributes:
        folder: where it is.
        name: of the recipe.
        files: name and SHA-256 of each raw file.
        dataset: SHA-256 of the dataset's manifest.
        bundled: whether the dataset is the bundled one.
        sizes: of train, val and test in each fold.
        repeated: ids that the official split names more than once.
        missing: ids of it that the dataset lacks, left out because the user allowed it.
    """

    folder: Path
    name: str
    files: tuple[tuple[str, str], ...]
    dataset: str
    bundled: bool
    sizes: tuple[tuple[int, int, int], ...]
    repeated: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def dataset_path(self) -> Path | None:
        """The dataset; None for the bundled one."""
        return None if self.bundled else self.folder / DATASET

    def split_file(self, fold: int) -> Path:
        """Return the split file of a fold."""
        return self.folder / f"fold-{fold}.json"

    def lines(self) -> Iterator[str]:
        """Say what was prepared."""
        for fold, sizes in enumerate(self.sizes):
            train, val, test = sizes
            yield f"{self.split_file(fold)}: train {train}, val {val}, test {test} crystals"
        if self.repeated:
            yield f"named more than once, kept in test before val before train: {_some(self.repeated)}"
        if self.missing:
            yield f"left out, for they could not be stored: {_some(self.missing)}"

    def write(self) -> None:
        """Write prepared.json."""
        values = {name: value for name, value in asdict(self).items() if name != "folder"}
        replace_file(self.folder / PREPARED, (json.dumps(values, indent=2) + "\n").encode())

    @classmethod
    def open(cls, folder: str | Path, recipe: Recipe) -> Prepared:
        """Read what `prepare_protocol` left.

        Raises:
            RecipeError: if it is not there, of another recipe, or its dataset has been changed.
        """
        folder = Path(folder)
        file = folder / PREPARED
        again = f"prepare it: mgt-fast protocol prepare {recipe.name} -o {folder}"
        if not file.is_file():
            raise RecipeError(f"{folder} holds no prepared protocol (no {PREPARED}); {again}")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            values |= {name: tuple(values[name]) for name in ("repeated", "missing")}
            values |= {name: tuple(map(tuple, values[name])) for name in ("files", "sizes")}
            found = cls(folder, **values)
        except (ValueError, TypeError, KeyError) as error:
            raise RecipeError(f"{file} is damaged ({type(error).__name__}: {error}); {again}") from error
        if found.name != recipe.name:
            raise RecipeError(f"{folder} holds {found.name}, not {recipe.name}; name another folder")
        digest = manifest_digest(CrystalDataset.open(found.dataset_path, verify=False))
        if digest != found.dataset:
            raise RecipeError(
                f"the dataset in {folder} is not the one that was prepared; {again} --overwrite"
            )
        return found


@dataclass(frozen=True)
class _Listing:
    """The crystals of raw files in their order: official ids, who has the target, and ids by file."""

    ids: list[str]
    known: list[bool]
    by_file: dict[str, list[str]]


def prepare_protocol(
    recipe: Recipe,
    folder: str | Path,
    raw: str | Path,
    console: Console,
    *,
    allow_missing: bool = False,
    workers: int | None = None,
    overwrite: bool = False,
) -> tuple[Prepared, PrepareSummary | None]:
    """Make a protocol's dataset and folds; raw files that are not there are fetched.

    Args:
        recipe: the protocol.
        folder: where it will be.
        raw: folder of the raw files.
        console: where progress goes.
        allow_missing: leave out crystals of the official split that could not be stored, instead of refusing.
        workers: processes that parse crystals; see `data.prepare`.
        overwrite: replace what the folder holds.

    Returns:
        The protocol, and what happened to the records; None for the bundled dataset.

    Raises:
        RecipeError: if a raw file is missing or another one, or the split does not fit the crystals.
        PrepareError, DatasetError: as `data.prepare`.
        ImportError: see `fetch.obtain`.
    """
    folder, raw = Path(folder), Path(raw)
    if (folder / PREPARED).exists() and not overwrite:
        raise RecipeError(f"{folder} is prepared already; name another folder or pass --overwrite")
    if isinstance(recipe.split, Own):
        dataset, summary, files = CrystalDataset.open(), None, {}
        folds = _checked(recipe, [_own_parts(dataset, recipe)])
    else:
        source = choose_source(recipe, raw)
        files = {file.name: obtain(file, raw, console) for file in source.all_files}
        if isinstance(recipe.split, ByIds):
            files[recipe.split.file.name] = obtain(recipe.split.file, raw, console)
        folds = _checked(recipe, _folds(recipe, source, files))
        summary = _make_dataset(recipe, source, files, folder / DATASET, console, workers, overwrite)
        dataset = CrystalDataset.open(folder / DATASET, verify=False)
    divided = [parts.once() for parts in folds]
    missing = _missing(recipe, dataset, [parts for parts, _ in divided], allow_missing)
    folds = [parts.without(set(missing)) for parts, _ in divided]
    make_folder(folder)
    prepared = Prepared(
        folder=folder,
        name=recipe.name,
        files=tuple((name, hash_file(path)) for name, path in files.items()),
        dataset=manifest_digest(dataset),
        bundled=isinstance(recipe.split, Own),
        sizes=tuple(parts.sizes for parts in folds),
        repeated=tuple(dict.fromkeys(name for _, repeated in divided for name in repeated)),
        missing=tuple(missing),
    )
    for number, parts in enumerate(folds):
        text = json.dumps({name: getattr(parts, name) for name in PARTS}, indent=0)
        replace_file(prepared.split_file(number), (text + "\n").encode())
    prepared.write()
    return prepared, summary


def _checked(recipe: Recipe, folds: list[Parts]) -> list[Parts]:
    """Return the folds if they have the official sizes; raise RecipeError otherwise."""
    for parts in folds:
        if recipe.sizes is not None and parts.sizes != recipe.sizes:
            raise RecipeError(
                f"{recipe.name} has {recipe.sizes} crystals (train, val, test), and these files give "
                f"{parts.sizes}; use the files that `mgt-fast protocol show {recipe.name}` names"
            )
    return folds


def _make_dataset(
    recipe: Recipe,
    source: Source,
    files: dict[str, Path],
    output: Path,
    console: Console,
    workers: int | None,
    overwrite: bool,
) -> PrepareSummary:
    """Store all crystals, those without the target too: a pretraining may use them."""
    say(console, f"preparing {output} from {', '.join(file.name for file in source.files)} ...")
    return prepare(
        [files[file.name] for file in source.files],
        output,
        targets={source.column: recipe.target} if source.column else {},
        units={recipe.target: recipe.unit} if recipe.target and recipe.unit else None,
        require_target="none",
        labels=None if source.labels is None else files[source.labels.name],
        rename=source.ids,
        format=source.format,
        workers=workers,
        overwrite=overwrite,
        console=console,
    )


def _folds(recipe: Recipe, source: Source, files: dict[str, Path]) -> list[Parts]:
    """Divide the crystals by the recipe's rule."""
    split = recipe.split
    if isinstance(split, NoSplit):
        return []
    if isinstance(split, ByIds):
        return [_named_parts(files[split.file.name])]
    listing = _listing(source, files)
    if isinstance(split, ByFiles):
        return [Parts(*(listing.by_file[getattr(split, part)] for part in PARTS))]
    if isinstance(split, ByFolds):
        folds = []
        for number, (train, test) in enumerate(k_folds(listing.ids, split.folds, split.random_state)):
            train, val = hold_out(train, split.val_fraction, split.val_seed + number)
            folds.append(Parts(train, val, test))
        return folds
    return [_shuffled(recipe, split, listing)]


def _shuffled(recipe: Recipe, split: ByShuffle, listing: _Listing) -> Parts:
    ids = [name for name, known in zip(listing.ids, listing.known, strict=True) if known]
    sizes = recipe.sizes or fraction_sizes(len(ids), split.fractions)
    try:
        return shuffled(ids, sizes, split.seed)
    except ValueError as error:
        raise RecipeError(
            f"{recipe.name}: {error}; use the files that `mgt-fast protocol show {recipe.name}` names"
        ) from None


def _listing(source: Source, files: dict[str, Path]) -> _Listing:
    """Read the raw files once more, for the names of all their records in order, stored or not."""
    listing = _Listing([], [], {})
    rename: Callable[[str], str] = source.ids or (lambda name: name)
    labels = None if source.labels is None else files[source.labels.name]
    for file in source.files:
        inputs = Inputs([files[file.name]], format=source.format, labels=labels)
        ids = listing.by_file.setdefault(file.name, [])
        for record in inputs.records():
            value = target_value(record.targets.get(source.column))
            ids.append(rename(record.id))
            listing.known.append(value is not None and not math.isnan(value))
        listing.ids.extend(ids)
    return listing


def _named_parts(path: Path) -> Parts:
    """Read the ids of a split file; an id may stand in two parts of an official one."""
    try:
        content = json.loads(read_text(path))
        return Parts(*([str(name) for name in content[part]] for part in PARTS))
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f'{path} is no id file: expected {{"train": ids, "val": ids, "test": ids}} '
            f"({type(error).__name__}: {error})"
        ) from error


def _own_parts(dataset: CrystalDataset, recipe: Recipe) -> Parts:
    known = ~np.isnan(target_values(dataset, recipe.target))
    return Parts(*([dataset.ids[i] for i in dataset.part(part) if known[i]] for part in PARTS))


def _missing(recipe: Recipe, dataset: CrystalDataset, folds: list[Parts], allowed: bool) -> list[str]:
    """Return the ids of the split that the dataset lacks.

    Raises:
        RecipeError: if there are any and that is not allowed, or nothing is left.
    """
    stored = set(dataset.ids)
    named = dict.fromkeys(name for parts in folds for name in parts)
    missing = [name for name in named if name not in stored]
    if missing and (not allowed or len(missing) == len(named)):
        raise RecipeError(
            f"{len(missing)} of the {len(named)} ids that {recipe.name} is divided by are not in the dataset "
            f"({_some(missing)}); {dataset.path / 'rejects.csv'} lists the records that could not be "
            "stored. Mend the raw files, or leave these crystals out, which is then on record "
            "(--allow-missing --overwrite)"
        )
    return missing


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:_SHOWN]) + (f", ... ({len(ids)} in all)" if len(ids) > _SHOWN else "")
