"""Hostile texts: crystals in CIF, POSCAR, extended xyz and csv, with mutations that know the grammar."""

from __future__ import annotations

import csv
import io
import random
import re
from functools import cache

import ase.io
import gemmi
from ase import Atoms
from pymatgen.core import Structure
from pymatgen.io.ase import AseAtomsAdaptor
from pymatgen.io.cif import CifWriter

from mgt_fast.data import CrystalDataset

LONG = 100_000  # characters in which a token to replace is looked for


def _words(*lines: str) -> list[str]:
    return " ".join(lines).split(" ")


NUMBERS = [
    *_words(
        "0 -0 1 -1 0.5 4 90 120 180 360 1e-3 1e6 1e7 1e8 1e-320 1e-160 1e154 1e308 1e400 -1e400 nan inf",
        "1.234(5) 1.2(3)4 (5) 1() 1.( .5 5. 1,5 1_0 0x1A 1d5 1e 1e+ --1 +-1 ? . １２ ½ 1/3 2147483648",
        "9223372036854775808 18446744073709551616 0.33333333333333333333333333333333",
    ),
    "9" * 400,
    "9" * 5000,
    "0." + "0" * 4000 + "1",
]
SYMBOLS = [
    *_words(
        "H D T He X Xx Vac Uuo Og Fe3+ Fe0+ O2- Na+1 fe FE Fe1A Wat 26 + - _ * ? . 'Fe2+' \"Fe\" é Ж \x00",
        "Rf Es Lr Fm Cf Va M Q nan None 0 119 -1 1e3",
    ),
    "Fe" * 5000,
]
WORDS = [
    *_words(
        "loop_ data_ data_x DATA_X save_ save_frame global_ stop_ _tag _ ; ' \" # $ [ ] { } \\ | \t \r \x00",
        "_cell_length_a _atom_site_label _atom_site_fract_x _atom_site_occupancy _atom_site_type_symbol",
        "_symmetry_equiv_pos_as_xyz _space_group_IT_number _space_group_name_H-M_alt P1 Fm-3m 'Fd-3m'",
        "id split numbers cell pbc frac_coords train Lattice= Properties= pbc= energy= ''' \"\"\" ,, \ufeff",
    ),
    "=" * 2000,
    '"' * 2001,
    "(" * 3000,
    " " * 100_000,
    "a" * 100_000,
]
OPERATIONS = [
    *_words(
        "x,y,z -x,-y,-z x,x,x 0,0,0 x,y x,y,z,t 2x,y,z x/2,y,z x+1/2,y,z+1/7 y,z,x -y,x-y,z h,k,l a,b,c ,,",
        "x+99999999999,y,z x+1/0,y,z x-1/24,y,z 1/0*x,y,z X,Y,Z x+0.5,y,z x+1e9,y,z ? . x,\ty,z",
        "x+0.333333333,y+0.666667,z x+1/3,y+2/3,z+2/3 --x,y,z +x,+y,+z x+y+z,x+y+z,x+y+z x*y,z,0 π,y,z",
    ),
    "x" * 20_000 + ",y,z",
    "x+1" * 3000 + ",y,z",
]
GROUPS = [
    "P 1",
    "Fm-3m",
    "F d -3 m :1",
    "F d -3 m",
    "R -3 c :H",
    "R 3 2",
    "I4_1/amd",
    "P21/c",
    "Fd-3m:3",
    "P 7",
    "?",
    "''",
]


@cache
def crystals() -> list[Structure]:
    """Return small crystals of the bundled dataset."""
    dataset = CrystalDataset.open()
    small = [i for i in range(0, len(dataset), 37) if dataset.num_atoms[i] <= 24][:40]
    found = []
    for i in small:
        batch = dataset.gather([i])
        found.append(Structure(batch.cell[0].numpy(), batch.numbers.numpy(), batch.frac_coords.numpy()))
    return found


@cache
def cifs() -> list[str]:
    """Return the crystals as CIF, some with symmetry operations."""
    return [str(CifWriter(crystal, symprec=0.01 if i % 3 else None)) for i, crystal in enumerate(crystals())]


@cache
def _written(format: str) -> list[str]:
    texts = []
    for crystal in crystals():
        atoms: Atoms = AseAtomsAdaptor.get_atoms(crystal)
        atoms = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
        stream = io.StringIO()
        ase.io.write(stream, atoms, format=format)
        texts.append(stream.getvalue())
    return texts


def replace_token(rng: random.Random, text: str) -> str:
    tokens = list(re.finditer(r"\S+", text[:LONG]))
    if not tokens:
        return rng.choice(WORDS)
    token = rng.choice(tokens)
    new = rng.choice(rng.choice([NUMBERS, SYMBOLS, WORDS]))
    return text[: token.start()] + new + text[token.end() :]


def replace_number(rng: random.Random, text: str) -> str:
    tokens = list(re.finditer(r"(?<=[\s=\"])-?\d+(\.\d+)?", text[:LONG]))
    if not tokens:
        return text
    token = rng.choice(tokens)
    return text[: token.start()] + rng.choice(NUMBERS) + text[token.end() :]


def edit_lines(rng: random.Random, text: str) -> str:
    lines = text.splitlines(keepends=True) or ["\n"]
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(6):
        case 0:
            del lines[i]
        case 1:
            lines.insert(j, lines[i])
        case 2:
            lines[i], lines[j] = lines[j], lines[i]
        case 3:
            lines.insert(i, rng.choice(WORDS) + rng.choice(["\n", "", " "]))
        case 4:
            del lines[min(i, j) : max(i, j)]
        case 5:
            lines[i] = lines[i] * rng.choice([2, 10, 1000])
    return "".join(lines)


def truncate(rng: random.Random, text: str) -> str:
    return text[: rng.randrange(len(text) + 1)]


def operations(rng: random.Random, text: str) -> str:
    """List other symmetry operations: odd ones, those of a group, or thousands."""
    match rng.randrange(4):
        case 0:
            triplets = rng.choices(OPERATIONS, k=rng.randrange(6))
        case 1:
            group = rng.choice(["F m -3 m", "I a -3 d", "F d -3 c:1", "P 6/m m m", "R -3 c:H"])
            triplets = [op.triplet() for op in gemmi.SpaceGroup(group).operations()]
        case 2:
            count = rng.choice([200, 1001, 5000, 40_000])
            triplets = [
                f"x+{rng.randrange(24)}/24,y+{rng.randrange(24)}/24,z+{k % 24}/24" for k in range(count)
            ]
        case _:
            triplets = [f"x,y,z+1/{k}" for k in range(2, rng.choice([4, 30, 900]))]
    tag = rng.choice(["_symmetry_equiv_pos_as_xyz", "_space_group_symop_operation_xyz"])
    quote = rng.choice(["'", "'", '"', ""])
    text = re.sub(r"loop_\n _symmetry_equiv_pos_site_id\n.*?\n(?=loop_)", "", text, flags=re.DOTALL)
    loop = f"loop_\n{tag}\n" + "".join(f"{quote}{triplet}{quote}\n" for triplet in triplets)
    return text + loop if rng.random() < 0.5 else text.replace("loop_", loop + "loop_", 1)


def group(rng: random.Random, text: str) -> str:
    """Name a space group that may contradict the cell or the operations."""
    text = re.sub(r"loop_\n _symmetry_equiv_pos_site_id\n.*?\n(?=loop_)", "", text, flags=re.DOTALL)
    text = re.sub(r"(?m)^_symmetry_(Int_Tables_number|space_group_name_H-M).*$", "", text)
    name = f"_space_group_name_H-M_alt '{rng.choice(GROUPS)}'\n"
    number = f"_space_group_IT_number {rng.choice([*NUMBERS, *map(str, range(1, 240, 9))])}\n"
    return text + rng.choice([name, number, name + number])


def cell(rng: random.Random, text: str) -> str:
    sides = r"(?m)^(_cell_(?:length|angle)_\w+\s+)\S+$"
    odd = rng.random() * 0.8
    return re.sub(sides, lambda m: m[1] + rng.choice(NUMBERS) if rng.random() < odd else m[0], text)


def many_atoms(rng: random.Random, text: str) -> str:
    """Repeat the last line, an atom, with other coordinates: dense, coincident or in a tiny cluster."""
    lines = text.rstrip("\n").split("\n")
    fields = lines[-1].split()
    if len(fields) < 6 or len(lines[-1]) > 1000:
        return text
    count, spread = rng.choice([100, 1000, 20_000, 150_000]), rng.choice([1.0, 1.0, 0.02, 0.0])
    lines[-1] = "\n".join(
        " ".join([*fields[:3], *(f"{rng.random() * spread:.5f}" for _ in range(3)), *fields[6:]])
        for _ in range(count)
    )
    if rng.random() < 0.5:
        lines = [
            re.sub(r"^(_cell_length_\w)\s.*", rf"\1 {rng.choice([30, 100, 1000])}", line) for line in lines
        ]
    return "\n".join(lines) + "\n"


def text_field(rng: random.Random, text: str) -> str:
    inside = rng.choice(
        ["data_evil\n_cell_length_a 1\n", "loop_\n_a\n", "x" * 70_000, "; not the end\n", "é\x00"]
    )
    end = rng.choice([";\n", ";\n", "", ";;\n", " ;\n"])
    at = text.find("\n", rng.randrange(len(text) + 1)) + 1
    return text[:at] + f"_publ_text\n;{inside}\n{end}" + text[at:]


def blocks(rng: random.Random, text: str) -> str:
    match rng.randrange(4):
        case 0:
            return text + rng.choice(cifs())
        case 1:
            return text * rng.choice([2, 5, 50])
        case 2:
            return text + "".join(f"data_{k % rng.choice([7, 10**9])}\n" for k in range(5000))
        case _:
            return f"{text}\nsave_frame\n{text.replace('data_', '_data_')}\nsave_\n"


def columns(rng: random.Random, text: str) -> str:
    """Remove, repeat or rename a tag of the atoms."""
    tags = re.findall(r"(?m)^ *_atom_site\w*$", text)
    if not tags:
        return text
    tag = rng.choice(tags)
    new = rng.choice(
        ["", f"{tag}\n{tag}", tag.upper(), tag + "x", tag.replace("fract", "Cartn"), rng.choice(tags)]
    )
    return text.replace(tag, new, 1)


def occupancies(rng: random.Random, text: str) -> str:
    lines = text.split("\n")
    return "\n".join(
        line[:-1] + rng.choice(["1", "1.0(1)", "0.9995", *NUMBERS]) if line.endswith(" 1") else line
        for line in lines
    )


def enormous(rng: random.Random, text: str) -> str:
    unit = rng.choice(
        ["loop_ _a ", "loop_ _a 1 ", "data_x ", "'", ";\n", "1 ", "\n", "#", "_a 1 ", "\x00", "save_x "]
    )
    return text + unit * rng.choice([1000, 100_000, 3_000_000])


def splice(rng: random.Random, text: str) -> str:
    other = rng.choice(cifs())
    return text[: rng.randrange(len(text) + 1)] + other[rng.randrange(len(other)) :]


GENERAL = [replace_token, replace_token, replace_number, replace_number, edit_lines, truncate]
OF_CIF = [*GENERAL, operations, group, cell, columns, occupancies, text_field, blocks, splice]
RARE = [many_atoms, enormous]


def mutated(rng: random.Random, text: str, mutations: list, rare: list | None = None) -> str:
    for _ in range(rng.choice([1, 1, 2, 3, 5])):
        text = rng.choice(mutations)(rng, text)
    if rare and rng.random() < 0.04:
        text = rng.choice(rare)(rng, text)
    return text


def cif(rng: random.Random) -> str:
    return mutated(rng, rng.choice(cifs()), OF_CIF, RARE)


def poscar(rng: random.Random) -> str:
    return mutated(rng, rng.choice(_written("vasp")), GENERAL)


def extxyz(rng: random.Random) -> str:
    frames = [rng.choice(_written("extxyz")) for _ in range(rng.choice([1, 1, 3]))]
    return "".join(mutated(rng, frame, GENERAL) for frame in frames)


LARGEST_TABLE = 2**20  # characters


def table(rng: random.Random) -> str:
    """Return a csv with a cif column."""
    stream = io.StringIO()
    header = rng.choice(
        [["material_id", "cif", "gap"], ["", "cif"], ["cif", "id", "cif"], ["id", "cif", "split", "id"]]
    )
    writer = csv.writer(stream)
    writer.writerow(header)
    for number in range(rng.choice([1, 3])):
        texts = {"cif": cif(rng) if rng.random() < 0.5 else rng.choice(cifs()), "gap": rng.choice(NUMBERS)}
        texts |= {"split": rng.choice(["train", "", "x"])}
        writer.writerow([texts.get(name, f"row {number}") for name in header])
    text = stream.getvalue()
    text = text if rng.random() < 0.4 else mutated(rng, text, GENERAL)
    return text[:LARGEST_TABLE]  # each line outside quotes is a record, and a record is what has a limit


def encoded(rng: random.Random, text: str) -> bytes:
    """Encode a text, mostly as UTF-8, and perhaps damage the bytes."""
    match rng.randrange(12):
        case 0:
            text = text.replace("\n", "\r\n")
        case 1:
            text = text.replace("\n", "\r")
        case 2:
            text = "\ufeff" + text
        case 3:
            return text.encode(rng.choice(["utf-16", "utf-32", "cp1252", "utf-7"]), errors="replace")
        case 4 | 5 | 6:
            return damaged(rng, text.encode(errors="replace"))
    return text.encode(errors="replace")


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Flip, insert, delete and repeat bytes."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 2, 8, 64])):
        at = rng.randrange(len(content) + 1)
        match rng.randrange(5):
            case 0 if at < len(content):
                content[at] ^= 1 << rng.randrange(8)
            case 1:
                content[at:at] = rng.randbytes(rng.choice([1, 4]))
            case 2:
                del content[at : at + rng.choice([1, 16, 256])]
            case 3:
                content[at:at] = content[at : at + rng.choice([1, 16, 256])]
            case 4:
                content[at : at + 1] = rng.choice(
                    [b"\x00", b"\xff", b"\x80", b"'", b";", b"\n", b"\r", b"\x1a"]
                )
    return bytes(content)
