"""How CUDA kernels are built, found, loaded and started; what they do is tested elsewhere."""

import ctypes
import importlib.util
import itertools
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mgt_fast import _C, cuda_module, frames_cuda, neighbors_cuda
from mgt_fast.cuda_module import CudaModule


class FakeCuPy:
    """Writes down what it is asked to do."""

    capability = (9, 0)

    def __init__(self):
        self.calls = []
        self.cuda = SimpleNamespace(Stream=SimpleNamespace(from_external=self.enter))

    def enter(self, stream):
        self.calls.append(("stream", stream.__cuda_stream__()))
        return nullcontext()

    def RawModule(self, **how):  # noqa: N802
        self.calls.append(("module", how))
        return SimpleNamespace(get_function=lambda name: lambda *args: self.calls.append((name, args)))


@pytest.fixture
def cupy(monkeypatch):
    fake = FakeCuPy()
    monkeypatch.setattr(cuda_module, "_import_cupy", lambda: fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: fake.capability)
    return fake


def test_kernels_start_on_torchs_stream_with_addresses(cupy, monkeypatch, tmp_path):
    (tmp_path / "some.fatbin").touch()
    monkeypatch.setattr(cuda_module, "_BUILT", tmp_path)
    cupy.capability = (8, 0)
    module, tensor = CudaModule("some"), torch.zeros(3)
    module.launch("nothing", 0, 128, tensor)
    assert not cupy.calls
    for _ in range(2):
        module.launch("kernel", 5, 128, 7, tensor, 0.5)
    launch = [("stream", (0, 77)), ("kernel", ((5,), (128,), (7, tensor.data_ptr(), 0.5)))]
    loaded = ("module", {"path": str(tmp_path / "some.fatbin")})
    assert cupy.calls == [launch[0], loaded, launch[1], *launch]


@pytest.mark.parametrize("too_old", [False, True])
def test_without_a_fatbin_for_the_device_nvrtc_compiles_the_source(cupy, monkeypatch, tmp_path, too_old):
    if too_old:
        (tmp_path / "some.fatbin").touch()
        cupy.capability = (7, 5)
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "some.cu").write_text("source")
    (folder / "some.hpp").write_text("header")
    monkeypatch.setattr(cuda_module, "_BUILT", tmp_path)
    CudaModule("some").launch("kernel", 1, 128, torch.zeros(1))
    _, how = cupy.calls[1]
    assert how["code"] == "source"
    assert {"--fmad=false", f"-I{folder}"} <= set(how["options"])
    (folder / "some.hpp").write_text("another")  # CuPy's cache must take this for another program
    assert CudaModule("some").nvrtc_options != how["options"]


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is installed")
def test_without_cupy_the_extra_is_named():
    with pytest.raises(RuntimeError, match=r"pip install 'mgt-fast\[cuda\]' .* cupy-cuda12x for CUDA 12"):
        CudaModule("neighbor_list").launch("count_edges", 1, 128, torch.zeros(1))


@pytest.mark.parametrize("name", ["lattice_frame", "neighbor_list"])
def test_the_source_travels_along_for_nvrtc(name):
    module = CudaModule(name)
    folder = Path(_C.__file__).with_name("csrc")
    assert "--fmad=false" in module.nvrtc_options
    waiting, seen = [module.source], set()
    while waiting:  # every header that is included has been installed
        for name in re.findall(r'#include "(.+)"', waiting.pop()):
            if name not in seen:
                seen.add(name)
                waiting.append((folder / name).read_text())
    assert {"geometry.hpp", "neighbor_device.hpp"} <= seen


def nvrtc():
    """NVRTC of the CUDA toolkit or of a wheel."""
    folders = [Path(entry).glob("nvidia/*/lib") for entry in sys.path]
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders.append(Path(root) / "lib64" for root in roots if root)
    for folder in itertools.chain(*folders):
        for library in folder.glob("libnvrtc.so*"):
            return ctypes.CDLL(str(library))
    pytest.skip("NVRTC is not installed (pip install nvidia-cuda-nvrtc)")


@pytest.mark.parametrize("architecture", ["compute_75", "compute_90"])
@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("neighbor_list", {"prepare_crystals", "find_shells", "count_edges", "fill_edges"}),
        ("lattice_frame", {"choose_frames"}),
    ],
)
def test_nvrtc_compiles_the_source(name, kernels, architecture):
    module, library = CudaModule(name), nvrtc()

    def text(size, read):
        length = ctypes.c_size_t()
        assert size(program, ctypes.byref(length)) == 0
        buffer = ctypes.create_string_buffer(length.value)
        assert read(program, buffer) == 0
        return buffer.value.decode()

    program = ctypes.c_void_p()
    created = library.nvrtcCreateProgram(
        ctypes.byref(program), module.source.encode(), b"source.cu", 0, None, None
    )
    assert created == 0
    given = [option.encode() for option in (*module.nvrtc_options, f"-arch={architecture}")]
    failed = library.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
    assert not failed, text(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog)
    assembly = text(library.nvrtcGetPTXSize, library.nvrtcGetPTX)
    assert set(re.findall(r"\.entry (\w+)", assembly)) == kernels


def constant(source, name):
    """An integer that a source file defines."""
    text = Path(_C.__file__).with_name("csrc").joinpath(source).read_text()
    return int(re.search(rf"constexpr int {name} = (\d+);", text).group(1))


def test_sizes_are_those_the_kernels_count_on():
    assert constant("neighbor_list.cu", "kThreads") == neighbors_cuda._THREADS
    assert constant("neighbor_list.cu", "kMostThreads") == neighbors_cuda._MOST_THREADS
    assert constant("neighbor_device.hpp", "kSearchCellBytes") == neighbors_cuda._CRYSTAL_BYTES
    assert constant("lattice_frame.cu", "kFrameThreads") == frames_cuda._THREADS
    assert constant("lattice_bases.hpp", "kMaxBases") == frames_cuda._MAX_BASES


def built(name):
    return Path(_C.__file__).with_name(f"{name}.fatbin")


@pytest.mark.skipif(
    not built("neighbor_list").exists(), reason="nvcc was not there when the package was built"
)
@pytest.mark.parametrize(
    ("name", "kernels", "most_registers", "most_stack"),
    [
        ("neighbor_list", {"find_shells", "count_edges", "fill_edges"}, 80, 0),  # 24 warps a multiprocessor
        ("lattice_frame", {"choose_frames"}, 128, 80),  # 4 blocks; on the stack are only arrays with an index
    ],
)
def test_kernels_keep_everything_in_registers(name, kernels, most_registers, most_stack):
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run(
        [tool, "--dump-resource-usage", built(name)], capture_output=True, text=True, check=True
    ).stdout
    usage = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report)
    assert {"sm_80", "sm_90"} <= set(re.findall(r"arch = (sm_\d+)", report))
    hot = [row for row in usage if row[0] in kernels]
    assert len(hot) == 2 * len(kernels)
    for kernel, registers, stack, _, local in hot:
        assert local == "0", kernel
        assert int(stack) <= most_stack, kernel
        assert int(registers) <= most_registers, kernel
