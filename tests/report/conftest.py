import made_runs
import pytest


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a fine-tuning run that has ended."""
    return made_runs.finetuning(tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """The folder of a pretraining run."""
    return made_runs.pretraining(tmp_path_factory.mktemp("runs") / "pretrained")


@pytest.fixture(scope="session")
def hostile(tmp_path_factory):
    """The folder of a run whose names, settings and figures hold markup and never break."""
    return made_runs.hostile(tmp_path_factory.mktemp("runs") / "a<b>&")
