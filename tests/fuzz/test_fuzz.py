"""Hostile inputs are stored or rejected with a code: none crashes, hangs, or takes more than 5 s and 1 GiB.

`make test` takes a few hundred, `make reliability` 20,000.
"""

import resource
import time
from collections import Counter

import pytest
import torch
from campaign import LIMITS, campaign, network
from faults import count
from hostile_arrays import hostile_arrays, hostile_batches, hostile_structures
from hostile_files import hostile_file
from hypothesis import HealthCheck, given, settings

from mgt_fast import CrystalBatch
from mgt_fast.data import CrystalDataset, prepare
from mgt_fast.inference import predict_crystals, predict_structures

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that parse
COUNT = count(200, 20_000)
FILES, ARRAYS = COUNT * 7 // 10, COUNT // 10  # and as many batches and structures as arrays

many = settings(
    max_examples=max(ARRAYS, 1),
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_files():
    reasons, faults = Counter(), []
    for seed, outcome in campaign(range(FILES)):
        reasons.update(outcome.reasons)
        if outcome.fault or outcome.seconds > LIMITS.seconds or outcome.memory > LIMITS.memory:
            faults.append((seed, outcome))
    assert not faults
    assert reasons["unreadable_cif"] > FILES / 10  # they are hostile indeed
    assert len(reasons) > 5


def test_many_files_at_once_in_workers(tmp_path):
    """Faults of one file do not reach another: with workers the same crystals are stored as without."""
    folder = tmp_path / "in"
    for seed in range(min(FILES, 500)):
        name, content = hostile_file(seed)
        (folder / str(seed)).mkdir(parents=True)
        (folder / str(seed) / name).write_bytes(content)
    stored = []
    for workers in (0, 2):
        summary = prepare(folder, tmp_path / str(workers), workers=workers, require_target="none")
        assert summary.read == summary.stored + summary.rejected
        stored.append(list(CrystalDataset.open(tmp_path / str(workers)).ids))
    assert stored[0] == stored[1]


def refused_or_predicted(work) -> None:
    """Check that `work` gives finite predictions, or says in a few words why it does not, in bounds."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    try:
        said = work()
    except (ValueError, TypeError) as error:
        said = str(error)
    if isinstance(said, str):
        assert 10 < len(said) < 2000
    else:
        assert torch.from_numpy(said.prediction).isfinite().all()
    assert time.process_time() - started < LIMITS.seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < LIMITS.memory / 1024


def predict(batch):
    return predict_crystals(network(), [batch], LIMITS.memory)


@many
@given(hostile_arrays())
def test_arrays(arrays):
    refused_or_predicted(lambda: predict(CrystalBatch.from_arrays(**arrays)))


@many
@given(hostile_batches())
def test_batches_made_by_hand(batch):
    refused_or_predicted(lambda: predict(batch))


@many
@given(hostile_structures())
def test_structures(structures):
    refused_or_predicted(lambda: predict_structures(network(), structures, memory=LIMITS.memory))
