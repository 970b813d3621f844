"""Write cgcnn_features.txt from a jarvis-tools wheel: `python make_cgcnn_features.py jarvis_tools-*.whl`.

Made from jarvis-tools 2026.6.12 (`jarvis/core/atom_init.json`); its metadata say "License: MIT".
"""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

HEADER = """\
# CGCNN element features (T. Xie and J. C. Grossman, Phys. Rev. Lett. 120, 145301, 2018).
# From jarvis-tools (Kamal Choudhary, https://github.com/atomgptlab/jarvis-tools), under the MIT licence.
# One element a line: atomic number, then its 92 features (0 or 1) as a 92-bit number, first feature first.
"""


def main(wheel: str) -> None:
    """Read the features from `wheel` and write them beside this script."""
    with zipfile.ZipFile(wheel) as archive:
        table = json.loads(archive.read("jarvis/core/atom_init.json"))
    lines = []
    for atomic_number in sorted(table, key=int):
        features = table[atomic_number]
        if len(features) != 92 or not set(features) <= {0, 1}:
            raise ValueError(f"element {atomic_number}: expected 92 features of 0 and 1, got {features}")
        lines.append(f"{atomic_number} {int(''.join(map(str, features)), 2):023x}\n")
    Path(__file__).with_name("cgcnn_features.txt").write_text(HEADER + "".join(lines))


if __name__ == "__main__":
    main(sys.argv[1])
