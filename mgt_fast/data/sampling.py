"""The order in which crystals are seen: a permutation that is computed, not stored.

Whoever knows (n, key) can say which crystal stands at any position, so that an order needs no table (10^8
crystals cost what ten do), no state, and is the same on every machine, for every split among ranks.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

MAX_ITEMS = 2**48
_ROUNDS = 6  # 4 leave traces that the tests find
_SMALL = 1024  # fewer items mix more slowly: 10 rounds leave traces in the orders of 6
_SMALL_ROUNDS = 24
_MASK = 2**64 - 1


def permuted(positions, n: int, key: int):
    """Return what stands at `positions` of the pseudo-random permutation of range(n) that `key` names.

    A number x is written as a pair (x // b, x % b) of Z_a × Z_b with a, b ≈ √n. A Feistel network permutes
    the pairs: each round adds to one half a hash of the other, modulo a or b. There are up to √n more pairs
    than numbers; where one of those comes out, the network is applied again until a number does (cycle
    walking). A hash is the upper part of (m x + c)^2 mod 2^64, with m and c drawn from the key.

    Args:
        positions: whole numbers from 0 to n - 1, of any shape: a NumPy array, or an integer tensor on any
            device. On a CUDA device they are not checked; the host waits once.
        n: number of items, from 1 to 2^48.
        key: any integer; equal modulo 2^64 means the same permutation.

    Returns:
        The items, as int64, of the shape and kind (array or tensor, and its device) of `positions`.

    Raises:
        ValueError: for n out of range.
        TypeError: if the positions are not whole numbers.
        IndexError: for a position outside range(n).

    Source: Black & Rogaway, Ciphers with Arbitrary Finite Domains (2002): generalised Feistel, cycle walking.
    """
    if not 1 <= n <= MAX_ITEMS:
        raise ValueError(f"n = {n} items; it must be from 1 to 2^48")
    n, positions = int(n), _whole_numbers(positions)
    x = positions.reshape(-1)  # of one dimension at least: NumPy warns when a scalar wraps round
    on_host = not (isinstance(x, torch.Tensor) and x.is_cuda)
    if on_host and len(x) and (x.min() < 0 or x.max() >= n):
        outside = x[(x < 0) | (x >= n)]
        raise IndexError(f"position {int(outside[0])} of a permutation of {n}")
    rounds = _rounds(int(key) & _MASK, _SMALL_ROUNDS if n < _SMALL else _ROUNDS)
    items = _network(x, n, rounds)
    while True:
        beyond = items >= n
        if not beyond.any():
            return items.reshape(positions.shape)
        items[beyond] = _network(items[beyond], n, rounds)


def _network(x, n: int, rounds: tuple[tuple[int, int], ...]):
    """Permute range(a·b), a·b >= n; int64 products wrap round, and % is never negative."""
    a, b = _sides(n)
    left = x // b
    right = x - left * b
    for i, (m, c) in enumerate(rounds):
        source, size = (right, a) if i % 2 == 0 else (left, b)
        hashed = source * m
        hashed += c
        hashed *= hashed
        hashed >>= 24  # up to 2^24 values a half; the 40 bits that are left make them equally likely
        hashed += left if i % 2 == 0 else right
        hashed %= size
        if i % 2 == 0:
            left = hashed
        else:
            right = hashed
    left = left * b
    left += right
    return left


def _sides(n: int) -> tuple[int, int]:
    """Return a and b of similar size with the smallest a·b >= n for that a."""
    a = math.isqrt(n - 1) + 1
    return a, -(-n // a)


@lru_cache(maxsize=1024)
def _rounds(key: int, count: int) -> tuple[tuple[int, int], ...]:
    """Return an odd factor and a summand, int64, for each of `count` rounds, by SplitMix64 from the key.

    Source: Steele, Lea & Flood, Fast Splittable Pseudorandom Number Generators (2014).
    """
    drawn = []
    for i in range(1, 2 * count + 1):
        z = key + i * 0x9E3779B97F4A7C15 & _MASK
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
        drawn.append(z ^ z >> 31)
    signed = [(z | 1 if i % 2 == 0 else z) - (z >> 63 << 64) for i, z in enumerate(drawn)]
    return tuple(zip(signed[::2], signed[1::2], strict=True))


def _whole_numbers(positions):
    """Return positions as an int64 array or tensor."""
    if isinstance(positions, torch.Tensor):
        if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
            raise TypeError(f"positions are {positions.dtype}, expected whole numbers")
        return positions.to(torch.int64)
    positions = np.asarray(positions)
    if positions.dtype.kind not in "iu" and positions.size:
        raise TypeError(f"positions are {positions.dtype}, expected whole numbers")
    return positions.astype(np.int64, copy=False)
