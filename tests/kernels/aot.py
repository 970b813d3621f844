"""Compile what the model launches for GPUs that are not there, and read what the compiler made of it.

    python tests/kernels/aot.py --channels 128 256 512 --precision float32 tf32 bf16 --arch 80 90

prints a line for every kernel and fails if one spills registers, needs more shared memory than there is, or
multiplies matrices without tensor cores. Triton's interpreter must be off.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mgt_fast import MGT, CrystalBatch, MGTConfig, build_graph
from mgt_fast.kernels.launch import Launch, watch_launches
from mgt_fast.losses import draw_noise, pretraining_loss
from mgt_fast.padding import bucket, pad_graph

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
# The tiles were chosen with this compiler; another one may place a register or two otherwise.
SPILLS = 0 if triton.__version__.startswith("3.7.") else 64
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
    tensor_core: int  # instructions, of any generation
    warpgroup: int  # those of Hopper among them
    has_dot: bool

    @property
    def fault(self) -> str:
        """What is wrong with it, or nothing."""
        if self.spills > SPILLS:
            return f"{self.spills} spills"
        if self.shared > SHARED_MEMORY[self.arch]:
            return f"{self.shared} bytes of shared memory"
        return "no tensor cores" if self.has_dot and not self.tensor_core else ""


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
        sass.count("HGMMA"),
        "tt.dot" in built.asm["ttir"],
    )


def model_launches(channels: int, precision: str, arch: int) -> list[Launch]:
    """List the distinct kernels of training steps, padded or not, and predictions; none of them runs."""
    positions, cell = [[0, 0, 0], [0.5, 0.5, 0.5]], [[[0, 2.8, 2.8], [2.8, 0, 2.8], [2.8, 2.8, 0]]]
    rock_salt = CrystalBatch.from_arrays([11, 17], positions, cell, [2])
    graph = build_graph(rock_salt, max_neighbors=6)
    padded = pad_graph(graph, *bucket(graph), num_crystals=2)
    config = MGTConfig(task="pretrain", channels=channels, num_blocks=1)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    found: dict[tuple, Launch] = {}
    for training, moving in product((True, False), repeat=2):
        model = MGT(config, backend="triton").train(training)
        noise = draw_noise(graph.to(dtype=torch.float32), 0.05)
        graph.edge_vec.requires_grad_(moving)  # forces want kernels of their own
        with (
            watch_launches(run=False, arch=arch) as seen,
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        ):
            pretraining_loss(model(graph, noise), graph, noise).total.backward()
            if training and not moving:
                finetuned = MGT(replace(config, task="predict"), backend="triton")
                finetuned(padded).prediction.sum().backward()
        found |= {key(launch): launch for launch in seen}
    return list(found.values())


_todo: list[tuple[str, Launch, int]] = []


def _compile(index: int) -> Compiled:
    _, launch, arch = _todo[index]
    return compile_launch(launch, arch)


def main() -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--channels", type=int, nargs="+", default=[256])
    parser.add_argument("--precision", nargs="+", default=["bf16"], choices=["float32", "tf32", "bf16"])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=list(SHARED_MEMORY))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the workers below are forks
    todo = {}
    for channels, precision, arch in product(arguments.channels, arguments.precision, arguments.arch):
        config = f"{channels} {precision} {arch}"
        for launch in model_launches(channels, precision, arch):
            todo.setdefault((key(launch), arch), (config, launch, arch))
    _todo.extend(todo.values())
    faults = 0
    with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
        for (config, *_), compiled in zip(_todo, pool.map(_compile, range(len(_todo))), strict=True):
            values = " ".join(f"{f.name} {getattr(compiled, f.name)}" for f in fields(compiled)[2:])
            sys.stdout.write(f"{config:<16} {compiled.name:<28} {values} {compiled.fault or 'ok'}\n")
            sys.stdout.flush()
            faults += bool(compiled.fault)
    sys.stdout.write(f"{len(_todo)} kernels compiled, {faults} at fault\n")
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main())
