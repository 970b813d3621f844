"""Compile recorded launches for GPUs that are not there, and read what the compiler made of them.

Runs in a process without TRITON_INTERPRET; `python tests/kernels/aot.py` compiles every kernel the model
launches and prints one line each.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mgt_fast.kernels.launch import Launch

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Compiled:
    """What one launch became on one architecture."""

    name: str
    arch: int
    registers: int
    shared: int
    spills: int
    tensor_core: int
    has_dot: bool


def key(launch: Launch) -> tuple:
    """Equal for launches that share one compiled kernel; the values of plain numbers do not count."""
    args = tuple(
        type(a) if isinstance(a, int | float) and not isinstance(a, bool) else a for a in launch.args
    )
    return (
        launch.name,
        args,
        tuple(sorted((name, str(value)) for name, value in launch.constants.items())),
        tuple(sorted(launch.options.items())),
    )


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compile for compute capability `arch` (80, 90) and disassemble."""
    names = launch.kernel.arg_names
    constants = dict(launch.constants)
    signature, attrs = {}, {}
    for position, (name, value) in enumerate(zip(names, launch.args, strict=False)):
        if value is None:
            constants[name] = None
        elif isinstance(value, torch.dtype):
            signature[name] = POINTERS[value]
            attrs[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    signature = {name: signature.get(name, "constexpr") for name in names}
    source = ASTSource(launch.kernel, signature, constants, attrs)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    return Compiled(
        launch.name,
        arch,
        int(re.search(r"REG:(\d+)", usage)[1]),
        built.metadata.shared,
        len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        len(re.findall(r"\bHGMMA|\bHMMA|\bDMMA", sass)),
        "tt.dot" in built.asm["ttir"],
    )
