import pytest

from mgt_fast.data import CrystalDataset
from mgt_fast.distributed import Ranks
from mgt_fast.train.setup import open_dataset


@pytest.mark.parametrize(
    ("size", "local_rank", "verifies"), [(1, None, True), (1, "3", True), (4, "0", True), (4, "3", False)]
)
def test_hashes_are_verified_once_a_machine(monkeypatch, size, local_rank, verifies):
    """A single process verifies whatever the environment says; of many, the first of each machine."""
    asked, opened = [], CrystalDataset.open
    monkeypatch.setattr(
        CrystalDataset, "open", lambda path, verify: asked.append(verify) or opened(path, verify=verify)
    )
    if local_rank is None:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
    else:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    ranks = Ranks.alone()
    ranks.size = size
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value] * self.size)
    open_dataset(None, ranks)
    assert asked == [verifies]
