import pytest

from mgt_fast import MGT, MGTConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 0}, "channels = 0; it must be at least 1"),
        ({"dropout": 1.0}, r"dropout = 1.0; it must lie in \[0, 1\)"),
        ({"views": "SE3"}, "views = 'SE3'; choose one of both, se3, so3"),
        ({"fusion": "sum"}, "fusion = 'sum'"),
        ({"denoising": "atom"}, "denoising = 'atom'"),
        ({"task": "train"}, "task = 'train'"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        MGTConfig(**changes)


def test_published_size():
    parameters = sum(p.numel() for p in MGT(MGTConfig(task="pretrain")).parameters())
    assert round(parameters / 1e6, 1) == 12.2
