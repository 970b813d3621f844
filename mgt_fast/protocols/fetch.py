"""Raw files of a recipe: found in a folder, or fetched by the field's own clients.

`jarvis` is jarvis-tools (`jarvis.db.figshare`), `matminer` matminer (`matminer.datasets`); the optional
dependencies `science` hold both. A file without a client is downloaded from its address.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from ..data.manifest import hash_file
from ..train.runlog import say
from .recipe import RawFile, Recipe, RecipeError, Source

_TIMEOUT = 60  # seconds without an answer


def find_file(raw: Path, file: RawFile) -> Path | None:
    """Return where a raw file is in a folder or below it, None if it is not there.

    Raises:
        RecipeError: if several files have this name, or it is another file than the official one.
    """
    found = [path for path in sorted(raw.rglob(file.name)) if path.is_file()]
    # What a killed fetch left is hidden, and may be half a file.
    found = [path for path in found if not any(part[0] == "." for part in path.relative_to(raw).parts)]
    if len(found) > 1:
        raise RecipeError(f"{raw} holds {file.name} twice ({found[0]}, {found[1]}); remove one of them")
    if found and file.sha256 is not None and (digest := hash_file(found[0])) != file.sha256:
        raise RecipeError(
            f"{found[0]} has SHA-256 {digest}, the official file {file.sha256}; remove it, and it is "
            "fetched again"
        )
    return found[0] if found else None


def choose_source(recipe: Recipe, raw: Path) -> Source:
    """Return the first source whose files are all there, or else the first one."""
    for source in recipe.sources:
        if all(find_file(raw, file) for file in source.all_files):
            return source
    return recipe.sources[0]


def obtain(file: RawFile, raw: Path, console: Console) -> Path:
    """Return a raw file's path; fetch it into the folder if it is not there.

    Raises:
        RecipeError: if it is not there and cannot be fetched; the message says which file to put where.
        ImportError: if the client that fetches it is not installed; the message says how to install it.
    """
    path = find_file(raw, file)
    if path is not None:
        return path
    if not file.can_be_fetched:
        raise RecipeError(f"{instruction(file, raw)}; no client can fetch it")
    say(console, f"fetching {file.name} ({file.client or file.url}) ...")
    fetch: Callable[[RawFile, Path], None] = _CLIENTS[file.client]
    raw.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=raw, prefix=".fetching-") as folder:
        try:
            # Clients print what they do, which is no output of the command.
            with contextlib.redirect_stdout(sys.stderr):
                fetch(file, Path(folder))
        except ImportError as error:
            raise ImportError(
                f"{file.client} is not installed ({error}): pip install 'mgt-fast[science]'; or "
                f"{instruction(file, raw)}"
            ) from error
        except Exception as error:  # a client raises whatever its libraries do where there is no internet
            raise RecipeError(
                f"{file.name} could not be fetched ({type(error).__name__}: {error!s:.200}); "
                f"{instruction(file, raw)}"
            ) from error
        fetched = Path(folder) / file.name
        if not fetched.is_file():
            left = ", ".join(sorted(os.listdir(folder))) or "nothing"
            raise RecipeError(
                f"{file.client or file.url} left {left} instead of {file.name}; {instruction(file, raw)}"
            )
        shutil.move(fetched, raw / file.name)
    return find_file(raw, file)


def instruction(file: RawFile, raw: Path) -> str:
    """Say which file to put where."""
    details = "; ".join(text for text in (file.url, file.note) if text)
    return f"put {file.name}{f' ({details})' if details else ''} into {raw}"


def _from_jarvis(file: RawFile, folder: Path) -> None:
    from jarvis.db.figshare import data

    data(dataset=file.key, store_dir=str(folder))


def _from_matminer(file: RawFile, folder: Path) -> None:
    from matminer.datasets import load_dataset

    load_dataset(file.key, data_home=str(folder))


def _from_address(file: RawFile, folder: Path) -> None:
    with (
        urllib.request.urlopen(file.url, timeout=_TIMEOUT) as answer,
        (folder / file.name).open("wb") as target,
    ):
        shutil.copyfileobj(answer, target)
        if answer.length:  # of what was announced; reading in pieces does not tell that it is missing
            raise OSError(f"the connection ended {answer.length} bytes early")


_CLIENTS: dict[str | None, Callable[[RawFile, Path], None]] = {
    "jarvis": _from_jarvis,
    "matminer": _from_matminer,
    None: _from_address,
}
