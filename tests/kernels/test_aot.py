"""Kernels compile for GPUs that are not there; `make aot` tries every width and precision."""

import os
import subprocess
import sys
from pathlib import Path

ATTENTION = {"keys_kernel", "values_kernel", "backward_values_kernel", "backward_keys_kernel"}


def test_kernels_compile_for_gpus():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("aot.py")
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    *lines, summary = (line.split() for line in result.stdout.splitlines())
    assert summary[1:] == ["kernels", "compiled,", "0", "at", "fault"]
    for arch in ("80", "90"):
        assert {line[3] for line in lines if line[2] == arch} > ATTENTION
    for line in lines:
        if line[3] in ATTENTION:  # on Hopper plain HMMA would be the slow path
            hopper = int(line[line.index("warpgroup") + 1])
            assert (hopper > 0) == (line[2] == "90"), line
