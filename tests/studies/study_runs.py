"""Tiny studies through the command line."""

from typer.testing import CliRunner

from mgt_fast.cli import app

TINY = (
    *("model.channels=8", "model.num_scalars=4", "model.num_vectors=2", "model.num_blocks=1"),
    *("model.expert_hidden=4", "data.limit=8", "data.max_neighbors=6", "optim.epochs=1"),
    *("optim.warmup_epochs=0.5", "optim.batch_size=8", "optim.lr=1e-3", "device=cpu", "threads=1"),
)
TINY_PRETRAINING = (
    *("data.limit=8", "optim.epochs=1", "optim.warmup_epochs=0.5", "optim.batch_size=8", "optim.lr=1e-3"),
)


def study(command, folder, *arguments, status=0, changes=()):
    """Run a study's command on a tiny network; return what it says."""
    sets = [f"--set={setting}" for setting in (*TINY, *changes)]
    sets += [f"--pretraining-set={setting}" for setting in TINY_PRETRAINING]
    result = CliRunner().invoke(app, [command, "-o", str(folder), *sets, *map(str, arguments)])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result
