import os

import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before its import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# cuBLAS repeats itself bit for bit only with a workspace of its own.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Small tensors: more threads only wait for one another, above all on a busy machine.
torch.set_num_threads(1)
