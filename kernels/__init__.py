"""The operations that carry the model's arithmetic.

Each folder is one operation: `__init__.py` is its public face, `reference.py` the plain PyTorch code that is
the CPU path and the oracle of every other backend. `segments.py` (which rows belong together) and
`activations.py` are what they share.
"""

BACKENDS = ("torch", "triton")


def check_backend(backend: str) -> str:
    """Return `backend` if it can run, and raise otherwise: nothing falls back silently.

    Raises:
        ValueError: for an unknown name.
        NotImplementedError: for "triton", whose kernels this version does not have yet.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend == "triton":
        raise NotImplementedError("this version has no Triton kernels yet; use backend='torch'")
    return backend
