"""The official divisions of crystals into train, val and test, by id; each rule once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..train.batches import PARTS


@dataclass(frozen=True)
class Parts:
    """The ids of each part, in the order of the rule."""

    train: list[str]
    val: list[str]
    test: list[str]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of train, val and test ids."""
        return len(self.train), len(self.val), len(self.test)

    def __iter__(self) -> Iterator[str]:
        for name in PARTS:
            yield from getattr(self, name)

    def without(self, ids: set[str]) -> Parts:
        """Return the parts without some ids."""
        return Parts(*([i for i in getattr(self, name) if i not in ids] for name in PARTS))

    def once(self) -> tuple[Parts, list[str]]:
        """Return the parts with every id in one of them, and the ids that were named more than once.

        Such an id stays where its crystal does least harm: in test before val before train, so that no
        network learns from a crystal that it is judged by.
        """
        seen: set[str] = set()
        kept = {}
        for name in reversed(PARTS):
            ids = dict.fromkeys(getattr(self, name))
            kept[name] = [i for i in ids if i not in seen]
            seen.update(ids)
        return Parts(*(kept[name] for name in PARTS)), [i for i, count in Counter(self).items() if count > 1]


def shuffled(ids: Sequence[str], sizes: tuple[int, int, int], seed: int = 123) -> Parts:
    """Divide crystals as jarvis-tools and ALIGNN do.

    The crystals that have the target are shuffled in the order of their file; the first `sizes[0]` are train,
    the last `sizes[2]` test, and the `sizes[1]` before these val. Where the sizes add up to fewer, those in
    between are left out: of JARVIS dft_3d (2021) that is one crystal for each target.

    Args:
        ids: of the crystals with the target, in the order of the file.
        sizes: of train, val and test.
        seed: of Python's generator.

    Raises:
        ValueError: if there are too few crystals.

    Source: the id files of the JARVIS leaderboard, which this rule reproduces.
    """
    if sum(sizes) > len(ids):
        raise ValueError(f"{len(ids)} crystals have the target, and the split needs {sum(sizes)}")
    order = list(range(len(ids)))
    random.Random(seed).shuffle(order)
    chosen = [ids[i] for i in order]
    n_train, n_val, n_test = sizes
    start = len(chosen) - n_test
    return Parts(chosen[:n_train], chosen[start - n_val : start], chosen[start:])


def fraction_sizes(count: int, fractions: tuple[float, float, float]) -> tuple[int, int, int]:
    """Return sizes of val and test rounded down, and the rest for train."""
    val, test = (int(fraction * count + 1e-9) for fraction in fractions[1:])
    return count - val - test, val, test


def k_folds(ids: Sequence[str], folds: int, random_state: int) -> list[tuple[list[str], list[str]]]:
    """Return training and test ids of each fold, both in the order of `ids`.

    Source: scikit-learn's `KFold(folds, shuffle=True, random_state=random_state)`, by which matbench divides
    its regression tasks (Dunn et al., npj Comput. Mater. 6, 138 (2020)).
    """
    order = np.arange(len(ids))
    np.random.RandomState(random_state).shuffle(order)  # the generator of the official folds
    found = []
    for members in np.array_split(order, folds):
        is_test = np.isin(np.arange(len(ids)), members)
        found.append(([ids[i] for i in np.flatnonzero(~is_test)], [ids[i] for i in np.flatnonzero(is_test)]))
    return found


def hold_out(train: Sequence[str], fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Return the training ids without a random fraction of them (rounded down, at least one), and these."""
    count = max(1, int(fraction * len(train) + 1e-9))
    chosen = set(np.random.default_rng(seed).permutation(len(train))[:count].tolist())
    rest = [name for i, name in enumerate(train) if i not in chosen]
    return rest, [name for i, name in enumerate(train) if i in chosen]
