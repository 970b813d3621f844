"""CrystaLLM pickles: a list of (id, CIF text), read without any class or function."""

from __future__ import annotations

import pickletools
import reprlib
from collections.abc import Iterator
from pickle import UnpicklingError
from typing import Any, BinaryIO

from .base import Faulty, PrepareError, RawRecord, Source
from .cif import CifText

# Opcodes that push their argument, store it in the memo, or take it from there.
_VALUES = {
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"),
    *("BININT", "BININT1", "BININT2", "BINFLOAT"),
}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def load(stream: BinaryIO) -> Any:
    """Read a pickle of strings, numbers, lists and tuples, and nothing else.

    The unpickler of the standard library, even one that refuses classes, can be made to fill the memory (a
    memo of 2^31 entries) and to work for ever (a dictionary whose key is a tuple of twins of twins).

    Raises:
        UnpicklingError: for an opcode that these need not.
        Exception: whatever a damaged pickle makes Python raise.
    """
    stack: list = []
    outer: list[list] = []  # the stacks below the marks
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in _VALUES:
            stack.append(argument)
        elif name in _PUTS:
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in _GETS:
            stack.append(memo[argument])
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name == "APPEND":
            item = stack.pop()
            stack[-1].append(item)
        elif name == "MARK":
            outer.append(stack)
            stack = []
        elif name in ("APPENDS", "LIST", "TUPLE"):
            items, stack = stack, outer.pop()
            if name == "APPENDS":
                stack[-1].extend(items)
            else:
                stack.append(items if name == "LIST" else tuple(items))
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name not in ("PROTO", "FRAME", "STOP"):
            given = stack[-2:] if name == "STACK_GLOBAL" else argument
            raise UnpicklingError(
                f"it asks for {name} {reprlib.repr(given)}; only strings, numbers, lists and tuples are read"
            )
    return stack.pop()


def read(source: Source) -> Iterator[RawRecord]:
    """Yield the pairs of the list."""
    with source.open() as stream:
        try:
            content = load(stream)
        except Exception as error:  # the opcodes of a damaged pickle raise whatever they come upon
            raise PrepareError(
                f"pickle {source.name} is not read: {type(error).__name__}: {error}"
            ) from error
    if not isinstance(content, list):
        raise PrepareError(f"pickle {source.name} holds a {type(content).__name__}, not a list of (id, CIF)")
    for number, item in enumerate(content, 1):
        where = f"{source.name}: item {number}"
        if isinstance(item, tuple | list) and len(item) == 2 and all(isinstance(part, str) for part in item):
            yield RawRecord(where, item[0], CifText(item[1]))
        else:
            fault = Faulty(reprlib.repr(item), "expected a pair of strings, (id, CIF)")
            yield RawRecord(where, f"{source.stem}-{number}", fault)
