"""Search for inputs that reach new branches of the readers, with atheris (Apache 2.0; `pip install atheris`).

    python tests/fuzz/guided.py CORPUS -max_total_time=600 -rss_limit_mb=2048 -timeout=5

CORPUS is a folder; what is found worth keeping stays there, and what fails is written to the current one. An
input is a file whose first byte tells the name it goes by. A new corpus begins with some hostile files.
"""

from __future__ import annotations

import io
import logging
import sys
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mgt_fast.data", "ase.io.vasp", "ase.io.extxyz", "ase.io.utils"]):
    import ase.io.extxyz
    import ase.io.vasp  # noqa: F401

    from mgt_fast.data.ingest import chunks
    from mgt_fast.data.parse import ParseOptions, parse_all
    from mgt_fast.data.readers.base import Source
    from mgt_fast.data.readers.inputs import Inputs

from hostile_files import KINDS, hostile_file

NAMES = sorted(KINDS.keys() - {"in.db"})  # SQLite reads from disk alone


def examine(data: bytes) -> None:
    """Read and parse an input; whatever is wrong with it, nothing may be raised."""
    if not data:
        return
    source = Source(NAMES[data[0] % len(NAMES)], "in", lambda: io.BytesIO(data[1:]))
    records = Inputs([Path(__file__)])._read(source, None)
    for chunk, parsed in parse_all(chunks(records), ParseOptions({}, "none"), workers=0):
        assert len(chunk) == len(parsed.kept) + len(parsed.rejected)


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable()
    folder = Path(sys.argv[1])
    if not folder.exists():
        folder.mkdir(parents=True)
        for seed in range(500):
            name, content = hostile_file(seed)
            if name in NAMES and len(content) < 20_000:
                (folder / str(seed)).write_bytes(bytes([NAMES.index(name)]) + content)
    atheris.Setup(sys.argv, examine)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
