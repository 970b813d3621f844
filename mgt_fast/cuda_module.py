"""CUDA kernels of `csrc`, loaded and launched through CuPy."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from . import _C

_BUILT = Path(_C.__file__).parent
"""Where the build put the kernels: NAME.fatbin if there was nvcc, and the sources in csrc."""

_OLDEST_BUILT = (8, 0)
"""Lowest compute capability that CMakeLists.txt builds for."""


class CudaModule:
    """The kernels of one source file, csrc/NAME.cu, loaded when first launched.

    The fatbin that nvcc built beside the package is loaded; where there is none, or none for a device that
    old, NVRTC compiles the source, once a machine.
    """

    def __init__(self, name: str):
        self.name = name
        self._kernels = {}  # by device and name

    def launch(self, kernel: str, blocks: int, threads: int, *args: torch.Tensor | int | float) -> None:
        """Start a kernel on torch's current stream; without blocks there is nothing to start.

        Args:
            kernel: its name, declared `extern "C"`.
            blocks: thread blocks.
            threads: threads a block.
            args: the kernel's parameters in order. A tensor stands for the address of its data; integers are
                passed as int64, floats as double.

        Raises:
            RuntimeError: if CuPy is not installed.
        """
        if blocks == 0:
            return
        cupy = _import_cupy()
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
        values = tuple(arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args)
        with (
            torch.cuda.device(device),
            cupy.cuda.Stream.from_external(_TorchStream(torch.cuda.current_stream(device))),
        ):
            if (device, kernel) not in self._kernels:
                self._kernels[device, kernel] = self._module(cupy, device).get_function(kernel)
            self._kernels[device, kernel]((blocks,), (threads,), values)

    def _module(self, cupy, device: torch.device):
        """Return the module for a device; CuPy loads those of the same origin once."""
        fatbin = _BUILT / f"{self.name}.fatbin"
        if fatbin.exists() and torch.cuda.get_device_capability(device) >= _OLDEST_BUILT:
            return cupy.RawModule(path=str(fatbin))
        return cupy.RawModule(code=self.source, options=self.nvrtc_options)

    @property
    def source(self) -> str:
        """The source that NVRTC compiles."""
        return (_BUILT / "csrc" / f"{self.name}.cu").read_text()

    @property
    def nvrtc_options(self) -> tuple[str, ...]:
        """How NVRTC compiles it; as nvcc does, without contraction to fused multiply-adds."""
        headers = sorted((_BUILT / "csrc").glob("*.hpp"))
        # CuPy's cache of compiled kernels looks at the source and the options, not at included files.
        digest = hashlib.sha256(b"".join(header.read_bytes() for header in headers)).hexdigest()
        return ("-std=c++17", "--fmad=false", f"-I{_BUILT / 'csrc'}", f"-DMGT_HEADERS_{digest[:16]}")


class _TorchStream:
    """A torch stream as CuPy takes it; torch's own lack the protocol in some versions."""

    def __init__(self, stream: torch.cuda.Stream):
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._stream.cuda_stream


def _import_cupy():
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(
            "graphs on a CUDA device need CuPy: pip install 'mgt-fast[cuda]' for CUDA 13, pip install "
            "cupy-cuda12x for CUDA 12; or bring the crystals to the CPU with crystals.to('cpu')"
        ) from error
    return cupy
