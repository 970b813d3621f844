"""From the inputs that a user names to records: folders and archives are walked, formats are found.

Archives are read member by member in memory; nothing inside one ever becomes a path on disk.
"""

from __future__ import annotations

import csv
import posixpath
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from . import FORMATS, READERS, STRUCTURE_FILES, check_format, detect, prepared
from .base import (
    DamagedError,
    Faulty,
    PrepareError,
    RawRecord,
    Source,
    UnknownLayoutError,
    target_value,
    unpacked_limit,
)

MAX_DEPTH = 3  # archives within archives
_ENDINGS = re.compile(r"(\.(cif|csv|vasp|poscar|extxyz|xyz|json|db|pkl|zip|tar|tgz|gz))+$", re.IGNORECASE)
_HIDDEN = re.compile(r"(^|/)(\.[^./]|__MACOSX(/|$))")
_LABEL_FILE = re.compile(r"(.*_)?id_prop\.csv", re.IGNORECASE)


@dataclass
class Labels:
    """Targets of structure files, by file name: the rows of an id_prop.csv.

    Attributes:
        name: the label file.
        rows: file name to its targets.
        used: the file names that were met.
        nearer: the last label file that was found nearer to some structures and used for them instead.
    """

    name: str
    rows: dict[str, dict[str, str]]
    used: set[str] = field(default_factory=set)
    nearer: str = ""

    @classmethod
    def read(cls, source: Source) -> Labels:
        """Read a file of rows `file name, target, ...`; a first row of names is recognised."""
        with source.open_text() as lines:
            rows = [row for row in csv.reader(lines) if row]
        width = len(rows[0]) if rows else 0
        uneven = next((row for row in rows if len(row) != width), None)
        if width < 2 or uneven:
            raise PrepareError(f"{source.name}: expected rows of a file name and its targets, found {uneven}")
        names = ["target"] if width == 2 else [f"target_{i}" for i in range(1, width)]
        if any(target_value(text) is None for text in rows[0][1:]):
            names = rows.pop(0)[1:]
        labels = {row[0]: dict(zip(names, row[1:], strict=True)) for row in rows}
        if len(labels) < len(rows):
            twice, _ = Counter(row[0] for row in rows).most_common(1)[0]
            raise PrepareError(f"{source.name} lists {twice!r} twice; remove one of the rows")
        return cls(source.name, labels)

    def of(self, source: Source) -> dict[str, str]:
        """Return the targets of a structure file, which may be listed with or without its ending."""
        filename = source.name.rpartition("/")[2]
        for key in (filename, _ENDINGS.sub("", filename)):
            if key in self.rows:
                self.used.add(key)
                return self.rows[key]
        return {}


class Inputs:
    """The records of all inputs, in order.

    Args:
        paths: files, folders, archives and prepared datasets; "bundled" is the dataset that comes with the
            package, where there is no file of that name.
        format: one of `FORMATS` for every file, instead of detection.
        labels: an id_prop.csv with the targets of CIF and POSCAR files. When absent, the one (named so, or
            ending in _id_prop.csv) inside the folder or archive, or beside the archive, is used.

    Attributes:
        notes: what the user should know: files left out, label files used, labels without a file.

    Raises:
        PrepareError: at once for a missing input or an unknown format.
    """

    def __init__(self, paths: Sequence[Path], *, format: str | None = None, labels: Path | None = None):
        check_format(format)
        if not paths:
            raise PrepareError("no input was named")
        for path in [*paths, *([labels] if labels else [])]:
            if not (path.exists() or (path in paths and prepared.dataset_folder(path))):
                raise PrepareError(f"{path} does not exist")
        self.paths, self.format = list(paths), format
        self.notes: list[str] = []
        self._left_out: list[str] = []
        self._label_files: dict[str, Labels] = {}
        self._given_labels = self._label_file(_file_source(labels)) if labels else None

    def records(self) -> Iterator[RawRecord]:
        """Yield every record.

        Raises:
            PrepareError: for an input that is damaged, of an unknown format, or holds no record.
        """
        for path in self.paths:
            if folder := prepared.dataset_folder(path):
                records = prepared.read(folder)
            elif path.is_dir():
                records = self._walk(_folder_files(path), self._given_labels)
            else:
                records = self._read(_file_source(path), self._given_labels, named=True)
            records = map(_legible, records)
            first = next(records, None)
            if first is None:
                raise PrepareError(f"{path} holds no record of a known format ({', '.join(FORMATS)})")
            yield first
            yield from records
        if self._left_out:
            shown = ", ".join(self._left_out[:5]) + (", ..." if len(self._left_out) > 5 else "")
            self.notes.append(f"{len(self._left_out)} files without crystals were left out: {shown}")
        for labels in self._label_files.values():
            if labels.nearer and not labels.used:
                self.notes.append(f"{labels.name} was not used: the labels came from {labels.nearer}")
                continue
            self.notes.append(f"{len(labels.rows)} labels were read from {labels.name}")
            unused = [name for name in labels.rows if name not in labels.used]
            if unused:
                self.notes.append(
                    f"{len(unused)} rows of {labels.name} name no structure, first {unused[0]!r}"
                )

    def targets(self, wanted: Container[str]) -> dict[str, prepared.Target]:
        """Return those of the prepared datasets' targets that are wanted, with their units.

        Raises:
            PrepareError: if two have a target of one name in different units.
        """
        known: dict[str, prepared.Target] = {}
        for folder in filter(None, map(prepared.dataset_folder, self.paths)):
            for name, target in prepared.targets_of(folder).items():
                if name not in wanted:
                    continue
                other = known.setdefault(name, target)
                if other.unit != target.unit:
                    raise PrepareError(
                        f"{folder}: {name} is in {target.unit or 'no unit'}, but in "
                        f"{other.unit or 'no unit'} in an earlier input; store one of them under another "
                        "name (--target) first"
                    )
        return known

    def _read(
        self, source: Source, labels: Labels | None, *, named: bool = False, depth: int = 0
    ) -> Iterator[RawRecord]:
        """Yield the records of a file or an archive.

        What the user named must be readable; another file that is not becomes one faulty record.
        """
        count, before = 0, len(self._left_out)
        try:
            with source.open() as stream:
                members = _archive_members(stream)
                if members is not None:
                    if depth == MAX_DEPTH:
                        raise DamagedError("it is an archive within so many others; unpack it")
                    beside = _files_beside(source.path) if named else []
                    files = _member_sources(source.name, members)
                    for record in self._walk(files, labels, beside, depth + 1):
                        count += 1
                        yield record
                    if not (count or named or len(self._left_out) > before):
                        self._left_out.append(source.name)
                    return
            format = self.format or detect(source)
            if format is None and named:
                raise PrepareError(f"{source.name} is of an unknown format; name one of {', '.join(FORMATS)}")
            if format is None:
                self._left_out.append(source.name)
                return
            if labels and format in STRUCTURE_FILES:
                source = replace(source, targets=labels.of(source))
            for record in READERS[format](source):
                count += 1
                yield record
            if not count and not named:
                self._left_out.append(source.name)
        except UnknownLayoutError:
            if named:
                raise
            self._left_out.append(source.name)
        except (
            Exception
        ) as error:  # damaged files make the libraries that unpack them raise whatever they meet
            whole = isinstance(error, PrepareError) and not isinstance(error, DamagedError)
            message = (
                str(error) if whole else f"{source.name} cannot be read: {type(error).__name__}: {error}"
            )
            if named:
                raise PrepareError(message) from error
            yield RawRecord(source.name, source.stem, Faulty(source.name, message, "unreadable_file"))

    def _walk(
        self, files: list[Source], labels: Labels | None, beside: Sequence[Source] = (), depth: int = 0
    ) -> Iterator[RawRecord]:
        """Yield the records of the files of a folder or an archive; labels may be in or beside it."""
        nearest = self._labels_in(files) or self._labels_in(beside) or labels
        if labels and nearest is not labels:
            labels.nearer = nearest.name
        for file in files:
            if not _LABEL_FILE.fullmatch(file.filename):
                yield from self._read(file, nearest, depth=depth)

    def _labels_in(self, files: Sequence[Source]) -> Labels | None:
        """Return the labels that the user named, or else those of the label file among `files`."""
        if self._given_labels:
            return self._given_labels
        found = [file for file in files if _LABEL_FILE.fullmatch(file.filename)]
        if not found:
            return None
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise PrepareError(f"there are several label files ({names}); say which one to use")
        return self._label_file(found[0])

    def _label_file(self, source: Source) -> Labels:
        if source.name not in self._label_files:
            self._label_files[source.name] = Labels.read(source)
        return self._label_files[source.name]


def _legible(record: RawRecord) -> RawRecord:
    """Return the record with escapes in its name for what is no valid text: it will be written down."""
    if record.id.isascii() and record.source.isascii():
        return record
    id, source = (text.encode(errors="backslashreplace").decode() for text in (record.id, record.source))
    return replace(record, id=id, source=source)


def read_text(path: Path) -> str:
    """Return the text of a file, which may be gzipped or the only file in a zip archive."""
    source = _file_source(path)
    with source.open() as stream:
        members = _archive_members(stream)
        if members is None:
            return source.read_text()
        if len(members) != 1:
            raise PrepareError(f"{path}: expected one file in the archive, found {len(members)}")
        return _member_sources(str(path), members)[0].read_text()


def _file_source(path: Path) -> Source:
    return Source(str(path), _ENDINGS.sub("", path.name), partial(path.open, "rb"), path)


def _files_beside(path: Path) -> list[Source]:
    return [_file_source(file) for file in sorted(path.parent.iterdir()) if file.is_file()]


def _folder_files(folder: Path) -> list[Source]:
    """Return the files below a folder, sorted by name."""
    files = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    sources = _member_sources(str(folder), {name: partial(path.open, "rb") for name, path in files.items()})
    return [replace(source, path=files[source.name.removeprefix(f"{folder}/")]) for source in sources]


def _archive_members(stream: BinaryIO) -> dict[str, Callable[[], BinaryIO]] | None:
    """Return the files in a zip or tar archive with what opens them; None if `stream` is no archive."""
    head = stream.read(512)
    stream.seek(0)
    if head.startswith(b"PK\x03\x04"):
        archive = zipfile.ZipFile(stream)
        files = [info for info in archive.infolist() if not info.filename.endswith("/")]
        return {info.filename: partial(_open_member, archive, info) for info in files}
    if head[257:262] == b"ustar":
        archive = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115
        return {m.name: partial(archive.extractfile, m) for m in archive.getmembers() if m.isfile()}
    return None


def _open_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> BinaryIO:
    if info.file_size > unpacked_limit(info.compress_size):
        raise DamagedError(f"it unpacks to {info.file_size} bytes; if that is meant, unpack it")
    return archive.open(info)


def _member_sources(container: str, members: dict[str, Callable[[], BinaryIO]]) -> list[Source]:
    """Return the members but hidden files; their ids leave out the folders that all structures share."""
    names = {name: posixpath.normpath(name).lstrip("/") for name in members}
    names = {name: clean for name, clean in names.items() if not _HIDDEN.search(clean)}
    folders = [
        posixpath.dirname(clean)
        for clean in names.values()
        if not _LABEL_FILE.fullmatch(posixpath.basename(clean))
    ]
    shared = posixpath.commonpath(folders) if folders else ""
    return [
        Source(f"{container}/{name}", _ENDINGS.sub("", clean.removeprefix(shared).lstrip("/")), members[name])
        for name, clean in names.items()
    ]
