import os

import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before its import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Small tensors: more threads only wait for one another, above all on a busy machine.
torch.set_num_threads(1)
