"""Run folders made without training: what the commands would leave, at the size that a test needs."""

import json

import numpy as np

from mgt_fast.checkpoint import BEST, LAST, CheckpointMeta, save_checkpoint
from mgt_fast.config import MGTConfig
from mgt_fast.data import CrystalDataset
from mgt_fast.distributed import Ranks
from mgt_fast.inference import PredictionTable, write_table
from mgt_fast.model import MGT
from mgt_fast.train.config import FinetuneConfig, PretrainConfig, dump_config, load_config
from mgt_fast.train.environment import describe_environment
from mgt_fast.train.setup import manifest_digest
from mgt_fast.train.targets import errors, trivial_errors

TARGET = "formation_energy_per_atom"
TINY = {"channels": 8, "num_scalars": 4, "num_vectors": 2, "num_blocks": 1, "expert_hidden": 4}
SETTINGS = [*(f"model.{name}={value}" for name, value in TINY.items()), "device=cpu", "threads=1"]

HOSTILE = (
    '<script>document.title = "taken"</script><img src="http://127.0.0.1/x" onerror="alert(1)">'
    "&quot;'{{ 7*7 }}<style>*{display:none}</style>" + "x" * 200
)


def write_lines(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def epochs_of(count, seed=0, **more):
    rng = np.random.default_rng(seed)
    fall = np.exp(-np.arange(count) / 4) + 0.02 * rng.random(count)
    return [
        {
            "epoch": epoch + 1,
            "train_loss": 0.5 * fall[epoch],
            "train_mae": 0.9 * fall[epoch],
            "val_mae": fall[epoch],
            "val_rmse": 1.4 * fall[epoch],
            "val_so3_share": 0.4 + 0.01 * epoch,
            "val_so3_share_std": 0.2,
            "val_one_view": 0.0,
            "lr": 1e-3,
            "seconds": 2.0,
            "graph_seconds": 0.5,
            **more,
        }
        for epoch in range(count)
    ]


def steps_of(count):
    rng = np.random.default_rng(0)
    loss, norm = rng.random((2, count)) + 0.1
    return [{"step": i + 1, "epoch": 1, "loss": loss[i], "norm": norm[i], "lr": 1e-3} for i in range(count)]


def finetuning(
    folder, *settings, epochs=6, steps=60, crystals=15, finished=True, ids=None, target=TARGET, unit="eV/atom"
):
    """Make the folder of a fine-tuning run on bundled crystals; return it.

    Args:
        settings: of its configuration, "a.b=c" each.
        epochs, steps: lines of its logs.
        crystals: of val and of test.
        finished: whether it has scored them.
        ids: names of the crystals, 2 * crystals; those of the dataset if None.
        target, unit: in the head of its predictions.
    """
    folder.mkdir(parents=True)
    changes = [*SETTINGS, f"optim.epochs={epochs}", "optim.warmup_epochs=0.5", *settings]
    config = load_config(FinetuneConfig, None, changes)
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "environment.json").write_text(json.dumps(describe_environment(config, Ranks())))
    write_lines(folder / "metrics.jsonl", epochs_of(epochs))
    write_lines(folder / "steps.jsonl", steps_of(steps))
    dataset = CrystalDataset.open()
    model = MGT(config.model)
    meta = CheckpointMeta(model=config.model, target=target, unit=unit, dataset=manifest_digest(dataset))
    for name in (BEST, LAST):
        save_checkpoint(folder / name, model, meta)
    if finished:
        score(folder, dataset, crystals, ids, target, unit, epochs)
    return folder


def score(folder, dataset, crystals, ids, target, unit, epochs):
    rng = np.random.default_rng(1)
    names = ids or [dataset.ids[i] for i in range(2 * crystals)]
    results, tables = {}, []
    for part, own in (("val", names[:crystals]), ("test", names[crystals:])):
        reference = rng.normal(size=len(own))
        prediction = reference + 0.1 * rng.standard_t(3, size=len(own))
        share = rng.random(len(own))
        table = PredictionTable(tuple(own), prediction, np.stack([1 - share, share], 1), target, unit)
        tables.append(table.columns(reference, part))
        results[part] = {"model": errors(reference, prediction), **trivial_errors(reference, np.zeros(3))}
    columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    write_table(folder / "predictions.csv", columns)
    results |= {"epochs": epochs, "best_epoch": epochs}
    (folder / "results.json").write_text(json.dumps(results))


def pretraining(folder, epochs=4):
    """Make the folder of a pretraining run that has ended; return it."""
    folder.mkdir(parents=True)
    changes = [*SETTINGS, f"optim.epochs={epochs}", "optim.warmup_epochs=0.5"]
    config = load_config(PretrainConfig, None, changes)
    (folder / "config.yaml").write_text(dump_config(config))
    write_lines(
        folder / "metrics.jsonl",
        [
            {"epoch": i + 1, "train_contrastive": 4.0 - i, "val_contrastive": 4.5 - i, "val_loss": 7.5 - i}
            | {"lr": 1e-3, "seconds": 2.0, "graph_seconds": 0.5}
            for i in range(epochs)
        ],
    )
    write_lines(folder / "steps.jsonl", steps_of(10))
    (folder / "results.json").write_text(
        json.dumps({"epochs": epochs, "best_epoch": epochs, "val_loss": 8.5 - epochs})
    )
    digest = manifest_digest(CrystalDataset.open())
    network = MGTConfig(task="pretrain", **TINY)
    save_checkpoint(folder / LAST, MGT(network), CheckpointMeta(model=network, dataset=digest))
    return folder


def hostile(folder):
    """Make the folder of a run whose names, settings and figures hold markup and never break; return it."""
    finetuning(
        folder,
        f"start={json.dumps(f'/{HOSTILE}')}",
        ids=[f"{HOSTILE}{i}" for i in range(30)],
        target=HOSTILE,
        unit="<b>eV</b>",
    )
    environment = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps(environment | {"device": HOSTILE, HOSTILE: HOSTILE}))
    write_lines(folder / "metrics.jsonl", epochs_of(6, **{HOSTILE: 1.0}))
    return folder
