"""Files that hold pickled tensors: lists of JARVIS items, and LMDB databases of graphs.

They are published with benchmarks and read when their format is named, never by detection: the standard
library's unpickler, though it may build nothing here but tensors, numbers and containers, can be made to fill
the memory.
"""

from __future__ import annotations

import io
import pickle
import shutil
import struct
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from .base import Arrays, Faulty, PrepareError, RawRecord, Source, UnknownLayoutError
from .json_lists import read_items

_LMDB_MAGIC = struct.pack("=I", 0xBEEFC0DE)  # behind the header of the first page
_LMDB_HEADER = 16
_LENGTH = b"length"  # the only key that is no number
GMAE_KEYS = ("gmae_atom_numb", "gmae_pos", "cell")


class _Holder:
    """Stands for an object of PyTorch Geometric: what it holds, without the library."""

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def _storage(data: bytes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch deprecates the storages of its own old files
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _latin1(text: str, encoding: str) -> bytes:
    """Return the bytes that pickles of protocol 2 hold as a text."""
    return text.encode("latin1")


_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")  # before and after numpy 2
_ALLOWED = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("_codecs", "encode"): _latin1,
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    **{(module, "scalar"): np._core.multiarray.scalar for module in _NUMPY},
    **{(module, "_reconstruct"): np._core.multiarray._reconstruct for module in _NUMPY},
}


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "torch_geometric":
            return _Holder
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}; only tensors and numbers are read")
        return _ALLOWED[module, name]


def read_tensor_pickle(source: Source) -> Iterator[RawRecord]:
    """Yield the items of a pickled list: those of JARVIS, whose targets may be tensors of one number."""
    with source.open() as stream:
        content = _unpickled(stream, source.name)
    if not isinstance(content, list):
        raise PrepareError(f"pickle {source.name} holds a {type(content).__name__}, not a list of items")
    plain = [_plain_values(item) if isinstance(item, dict) else item for item in content]
    yield from read_items(source, plain, "jarvis")


def read_gmae(source: Source) -> Iterator[RawRecord]:
    """Yield the crystals of an LMDB database of graphs, each a slab with its adsorbate at the global minimum.

    Their structure stands in `gmae_atom_numb`, `gmae_pos` and `cell`, their name in `sid`; every other single
    number, as `y_relaxed`, is a possible target.
    """
    try:
        import lmdb
    except ImportError as error:
        raise PrepareError(f"{source.name}: pip install lmdb, which reads it ({error})") from error

    with _on_disk(source) as path:
        try:
            database = lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False)
        except lmdb.Error as error:
            raise PrepareError(f"{source.name} is a damaged database: {error}") from error
        with database, database.begin() as view:
            keys = sorted(
                (key for key in view.cursor().iternext(values=False) if key != _LENGTH), key=_number
            )
            for key in keys:
                label = key.decode(errors="backslashreplace")
                where, name = f"{source.name}: graph {label}", f"{source.stem}-{label}"
                try:
                    values = _graph_values(_unpickled(io.BytesIO(view.get(key)), where))
                    missing = [name for name in GMAE_KEYS if name not in values]
                    if missing:
                        raise PrepareError(f"the graph has no {missing[0]}; it has {', '.join(values)}")
                except PrepareError as error:
                    yield RawRecord(where, name, Faulty(label, str(error)))
                    continue
                numbers, positions, cell = (np.asarray(values.pop(key)) for key in GMAE_KEYS)
                name = str(values.pop("sid", name))
                payload = Arrays(numbers.tolist(), positions, cell.reshape(-1, 3), cartesian=True)
                targets = {
                    key: value for key, value in values.items() if isinstance(value, int | float | str)
                }
                yield RawRecord(where, name, payload, targets)


def _number(key: bytes) -> tuple[int, bytes]:
    """Order keys by their number: an LMDB database has them in that of their digits."""
    return (int(key), b"") if key.isdigit() else (-1, key)


@contextmanager
def _on_disk(source: Source) -> Iterator[Path]:
    """Yield a path of the database: its own, or of a copy if it is packed."""
    with source.open() as stream:
        head = stream.read(_LMDB_HEADER + len(_LMDB_MAGIC))
        if head[_LMDB_HEADER:] != _LMDB_MAGIC:
            raise UnknownLayoutError(f"{source.name} is no LMDB database")
        if source.path is not None:
            yield source.path
            return
        stream.seek(0)
        with tempfile.NamedTemporaryFile(suffix=".lmdb") as copy:
            shutil.copyfileobj(stream, copy)
            copy.flush()
            yield Path(copy.name)


def _unpickled(stream: BinaryIO, name: str) -> Any:
    try:
        return _TensorUnpickler(stream).load()
    except MemoryError:
        raise
    except Exception as error:  # the opcodes of a damaged pickle raise whatever they come upon
        raise PrepareError(f"pickle {name} is not read: {type(error).__name__}: {error}") from error


def _graph_values(graph: object) -> dict[str, Any]:
    """Return the values of a graph of PyTorch Geometric, as its versions 1 and 2 hold them."""
    values = dict(vars(graph)) if isinstance(graph, _Holder) else {}
    store = values.pop("_store", None)
    if isinstance(store, _Holder):
        values |= store.__dict__.get("_mapping", {})
    return _plain_values(values)


def _plain_values(values: dict) -> dict:
    """Turn tensors and numpy numbers of one element into numbers, and other tensors into arrays."""

    def plain(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.item() if value.numel() == 1 else value.numpy()
        return value.item() if isinstance(value, np.generic) else value

    return {key: plain(value) for key, value in values.items()}
