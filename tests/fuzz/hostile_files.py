"""Hostile files: the texts of `hostile_texts`, JSON, pickles, archives and databases, as named bytes."""

from __future__ import annotations

import gzip
import io
import json
import math
import pickle
import random
import sqlite3
import struct
import tarfile
import tempfile
import zipfile
from pathlib import Path

import ase.db
import hostile_texts as texts
from pymatgen.io.ase import AseAtomsAdaptor

KEYS = [
    "id",
    "material_id",
    "split",
    "numbers",
    "cell",
    "gap",
    "",
    "\ud800",
    "a\x00b",
    "é",
    "pbc",
    "x" * 5000,
]
ODD = [
    *[
        None,
        True,
        False,
        0,
        -1,
        1,
        0.5,
        10**400,
        -(10**400),
        2**63,
        1e308,
        math.nan,
        math.inf,
        -math.inf,
        1e-320,
    ],
    *["", "Na", "nan", "1.5", "\ud800", "\x00", "é" * 1000, "?", "na", "train", "test", "1e999"],
    *[
        [],
        {},
        [[]],
        [None],
        [1, 2, 3],
        [[0, 0, 0]],
        [[1, 2], [3]],
        {"a": 1},
        [math.nan] * 3,
        ["Na"],
        [[[1, 0, 0]] * 3],
    ],
]


def _paths(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _paths(inner, (*path, key))


def _replaced(rng: random.Random, content):
    """Replace, remove, repeat or nest a value somewhere."""
    text = json.dumps(content)
    content = json.loads(text)
    path = rng.choice(list(_paths(content)))
    if not path:
        return rng.choice([content, [content], {"a": content}, rng.choice(ODD)])
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    match rng.randrange(6):
        case 0 | 1 | 2:
            holder[path[-1]] = rng.choice(ODD)
        case 3:
            del holder[path[-1]]
        case 4 if isinstance(holder, dict):
            holder[rng.choice(KEYS)] = rng.choice(ODD)
        case 4 | 5:
            holder[path[-1]] = [holder[path[-1]]] * rng.choice([1, 2, 2000 if len(text) < 20_000 else 3])
    return content


def _item(rng: random.Random, layout: str, number: int):
    crystal = rng.choice(texts.crystals())
    matrix, frac = crystal.lattice.matrix.tolist(), crystal.frac_coords.tolist()
    match layout:
        case "jarvis":
            elements = [site.specie.symbol for site in crystal]
            atoms = {"lattice_mat": matrix, "coords": frac, "elements": elements, "cartesian": False}
            return {"jid": f"JVASP-{number}", "atoms": atoms, "gap": 1.0}
        case "mp":
            return {"material_id": f"mp-{number}", "structure": texts.cif(rng), "gap": 1.0}
        case "atoms":
            atoms = {"positions": crystal.cart_coords.tolist(), "cell": matrix, "pbc": [True, True, False]}
            return {
                "id": number,
                "atomic_numbers": [int(z) for z in crystal.atomic_numbers],
                **atoms,
                "e": -1.0,
            }
        case "matbench":
            return [crystal.as_dict(), 1.0]


def json_file(rng: random.Random) -> bytes:
    """Return a JSON file in one of the layouts."""
    layout, count = rng.choice(["jarvis", "mp", "atoms", "matbench"]), rng.choice([1, 2, 4])
    items, index = [_item(rng, layout, number) for number in range(count)], list(range(count))
    content = (
        {"index": index, "columns": ["structure", "gap"], "data": items} if layout == "matbench" else items
    )
    for _ in range(rng.choice([1, 1, 2, 5])):
        content = _replaced(rng, content)
    text = json.dumps(content)
    match rng.randrange(16):
        case 0:
            text = "[" * rng.choice([900, 1100, 100_000]) + text
        case 1:
            text = text.replace("0.", "1" * 5000, 1)
        case 2:
            text = texts.mutated(rng, text, texts.GENERAL)
        case 3:
            text = text[:-1] + ', {"a": 1, "a": 2}' + text[-1:]
        case 4:
            return texts.encoded(rng, text)
    return text.encode(errors="surrogatepass")


def pickle_file(rng: random.Random) -> bytes:
    """Return a pickle of pairs, of other things, or of opcodes that are up to no good."""
    pairs = [
        (rng.choice([f"oqmd-{k}", "\ud800", "", "a\x00"]), texts.cif(rng)) for k in range(rng.choice([1, 3]))
    ]
    laughs: list = ["lol"]
    for _ in range(40):
        laughs = [laughs, laughs]
    twins: tuple = ()
    for _ in range(40):
        twins = (twins, twins)
    recursive: list = []
    recursive.append(recursive)
    deep: list = []
    for _ in range(300):
        deep = [deep]
    contents = [
        pairs,
        pairs,
        *ODD,
        [laughs],
        laughs,
        [twins],
        recursive,
        [recursive],
        [deep],
        [*pairs, 1],
        [{"a": 1}],
    ]
    content = pickle.dumps(rng.choice(contents), protocol=rng.choice([2, 3, 4, 5]))
    match rng.randrange(10):
        case 0:
            return content[:2] + b"]r" + struct.pack("<I", 2**31 - 1) + content[2:]  # a memo of 2^31 entries
        case 1:
            return content[:2] + b"\x8d" + struct.pack("<Q", rng.choice([2**62, 2**33, 2**63])) + content[2:]
        case 2:  # the hash of a tuple of twins never ends
            return b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"}h\x00K\x01s."
        case 3:
            return b"\x80\x02" + b"cos\nsystem\n(S'true'\ntR." + content[2:]
        case 4:
            return b"\x80\x04" + b"(" * rng.choice([10, 10**6]) + content[2:]
        case 5:
            return b"\x80\x04\x95" + struct.pack("<Q", rng.choice([2**60, 10, 0])) + content[2:]
        case 6 | 7:
            return texts.damaged(rng, content)
    return content


def database(rng: random.Random) -> bytes:
    """Return an ASE database, perhaps with damaged rows, views and triggers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.db"
        with ase.db.connect(path) as rows:
            for number in range(2):
                atoms = AseAtomsAdaptor.get_atoms(rng.choice(texts.crystals()))
                rows.write(atoms, gap=1.0, name=f"crystal {number}")
        connection = sqlite3.connect(path)
        columns = ["numbers", "positions", "cell", "pbc", "natoms", "energy", "key_value_pairs", "data", "id"]
        for _ in range(rng.choice([0, 1, 2])):
            value = rng.choice(
                [None, b"", rng.randbytes(24), "{}", "[1", 7, 10**18, "x" * 10_000, b"\x00" * 8]
            )
            try:
                connection.execute(f"UPDATE systems SET {rng.choice(columns)} = ? WHERE id = 1", (value,))
            except sqlite3.Error:
                continue
        if rng.random() < 0.2:
            endless = "WITH RECURSIVE r(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM r) SELECT id FROM r"
            connection.execute("DROP TABLE IF EXISTS keys")
            connection.execute("ALTER TABLE systems RENAME TO others")
            connection.execute(f"CREATE VIEW systems AS {endless}")
        connection.commit()
        connection.close()
        content = path.read_bytes()
    return texts.damaged(rng, content) if rng.random() < 0.5 else content


def _zip(rng: random.Random, members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            kinds = [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2]
            info.compress_type = rng.choice(kinds if len(content) < 10**6 else kinds[:1])
            if rng.random() < 0.1:
                info.external_attr = 0o120777 << 16  # a symbolic link
            archive.writestr(info, content)
    return stream.getvalue()


def _tar(rng: random.Random, members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=rng.choice(["w", "w:gz"])) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if rng.random() < 0.15:
                info.type = rng.choice(
                    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE]
                )
                info.linkname, info.size = rng.choice(["/etc/passwd", "../../x", name, "a.cif", "none"]), 0
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def archive(rng: random.Random, depth: int = 0) -> bytes:
    names = [
        "a.cif",
        "../../evil.cif",
        "/etc/evil.cif",
        "b/c.cif",
        "b/../c.cif",
        "./d.cif",
        "",
        ".",
        "..",
        "\\x.cif",
        "é.cif",
    ]
    names += [
        "POSCAR",
        "id_prop.csv",
        ".hidden.cif",
        "__MACOSX/a.cif",
        "n" * 300 + ".cif",
        "a\nb.cif",
        "A.CIF",
        "a.txt",
    ]
    members = {}
    for name in rng.sample(names, rng.choice([1, 3, 6])):
        members[name] = texts.encoded(rng, texts.cif(rng) if rng.random() < 0.6 else rng.choice(texts.cifs()))
    match rng.randrange(10):
        case 0:
            unit = rng.choice([b"\x00" * 100, b"#" * 99 + b"\n", b"a " * 50])
            members["bomb.cif"] = unit * rng.choice([10**4, 10**6])
        case 1:
            members |= {f"{k}.cif": b"" for k in range(rng.choice([300, 5000]))}
        case 2 if depth < 3:
            members["inner.zip"] = archive(rng, depth + 1)
        case 3:
            members["id_prop.csv"] = texts.mutated(
                rng, "a.cif,1.0\nb/c.cif,2\nPOSCAR,x\n", texts.GENERAL
            ).encode()
    content = rng.choice([_zip, _tar])(rng, members)
    if rng.random() < 0.15:
        content = gzip.compress(content)
    return texts.damaged(rng, content) if rng.random() < 0.3 else content


def gzipped(rng: random.Random) -> bytes:
    content = gzip.compress(texts.encoded(rng, texts.cif(rng)), rng.choice([0, 1, 9]))
    if rng.random() < 0.1:  # gzip within gzip, and a bomb
        content = gzip.compress(gzip.compress(bytes(rng.choice([10**6, 3 * 10**8])), 1), 1)
    return texts.damaged(rng, content) if rng.random() < 0.5 else content * rng.choice([1, 2])


KINDS = {
    "in.cif": (60, lambda rng: texts.encoded(rng, texts.cif(rng))),
    "in.vasp": (6, lambda rng: texts.encoded(rng, texts.poscar(rng))),
    "in.extxyz": (8, lambda rng: texts.encoded(rng, texts.extxyz(rng))),
    "in.csv": (6, lambda rng: texts.encoded(rng, texts.table(rng))),
    "in.json": (10, json_file),
    "in.pkl": (4, pickle_file),
    "in.db": (1, database),
    "in.zip": (3, archive),
    "in.cif.gz": (2, gzipped),
}


def hostile_file(seed: int) -> tuple[str, bytes]:
    """Return name and content of the file of this number."""
    rng = random.Random(seed)
    (name,) = rng.choices(list(KINDS), weights=[weight for weight, _ in KINDS.values()])
    return name, KINDS[name][1](rng)
