"""Random numbers without a state: each is a function of an int64 key and of its place in a row.

What a crystal is given (noise, dropout) then depends on the crystal, the step and the seed alone: not on what
came before, nor on the crystals beside it, nor on the process that works on it. Keys and numbers are those
of SplitMix64, in signed arithmetic that wraps, so that a CPU and a GPU draw the same words and the same
`uniform` numbers, bit for bit; `normal` numbers differ between them by the rounding of log and cos.

Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from __future__ import annotations

import math

import torch

_WORD = 2**64
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD // 2 else word


def stream_key(*parts: int) -> int:
    """Return one int64 key for some whole numbers, as seed, epoch and purpose; their order counts."""
    word = 0
    for part in parts:
        word = ((word ^ (part % _WORD)) + _GOLDEN) % _WORD
        word = (word ^ (word >> 30)) * _FIRST % _WORD
        word = (word ^ (word >> 27)) * _SECOND % _WORD
        word ^= word >> 31
    return _signed(word)


def _scramble(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function, in place; right shifts of int64 keep the sign and need a mask."""
    x = x.add_(_signed(_GOLDEN))
    x = x.bitwise_xor_((x >> 30).bitwise_and_(2**34 - 1)).mul_(_signed(_FIRST))
    x = x.bitwise_xor_((x >> 27).bitwise_and_(2**37 - 1)).mul_(_signed(_SECOND))
    return x.bitwise_xor_((x >> 31).bitwise_and_(2**33 - 1))


def fork_keys(keys: torch.Tensor, numbers: torch.Tensor | int) -> torch.Tensor:
    """Return the key of each (key, number), int64; independent of the key's own random numbers.

    Args:
        keys: int64.
        numbers: whole numbers that broadcast with them: positions, or the purpose of the numbers to be drawn.
    """
    return _scramble(_scramble(keys ^ stream_key(1)) ^ numbers)


def random_words(keys: torch.Tensor, columns: int) -> torch.Tensor:
    """Draw random bits, (R,) keys → (R, columns) int64."""
    places = torch.arange(columns, device=keys.device).mul_(_signed(_GOLDEN))
    return _scramble(keys[:, None] + places)


def uniform(keys: torch.Tensor, columns: int) -> torch.Tensor:
    """Draw numbers evenly from [0, 1), (R,) keys → (R, columns) float32, multiples of 2^-24."""
    return (random_words(keys, columns) >> 40).bitwise_and_(2**24 - 1).float().mul_(2.0**-24)


def normal(keys: torch.Tensor, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Draw standard normal numbers, (R,) keys → (R, columns); at most 6.8 in size.

    Source:
        Box and Muller 1958; both numbers of a pair come from one word of 64 bits.
    """
    words = random_words(keys, -(-columns // 2))
    high = (words >> 32).bitwise_and_(2**32 - 1).to(dtype).add_(0.5).mul_(2.0**-32)
    angle = words.bitwise_and_(2**32 - 1).to(dtype).mul_(2 * math.pi * 2.0**-32)
    radius = high.log_().mul_(-2).sqrt_()
    return torch.stack((angle.cos() * radius, angle.sin() * radius), dim=2).flatten(1)[:, :columns]
