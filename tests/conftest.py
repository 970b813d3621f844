import torch

# Small tensors: more threads only wait for one another, above all on a busy machine.
torch.set_num_threads(1)
