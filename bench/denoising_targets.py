"""Which denoising target helps fine-tuning more: the crystal's mean noise (published) or each edge's?

For every seed a small network is pretrained on the bundled crystals (train part and those in no part, no
labels) once with each target, then fine-tuned on formation energy with few and with all training labels,
beside a network that starts from scratch. Everything but the start is equal: sizes, steps, learning rates,
order of the crystals. Prints a table of test errors and writes every figure to a JSON file.

    python bench/denoising_targets.py --pretrain-lr 1e-3 --output bench/results/denoising_targets_lr1e-3.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from conftest import device_name
from rich.console import Console

from mgt_fast.train.config import FinetuneConfig, PretrainConfig, load_config
from mgt_fast.train.finetune import finetune
from mgt_fast.train.pretrain import pretrain

STARTS = ("scratch", "crystal", "edge")
NETWORK = ["model.channels=32", "model.num_scalars=16", "model.num_vectors=4", "model.num_blocks=1"]
NETWORK += ["data.max_neighbors=12"]
OPTIM = ["optim.warmup_epochs=0.5", "optim.grad_clip=10", "threads=1"]


def run_seed(arguments: argparse.Namespace, seed: int) -> list[dict]:
    """Run every start and label count for one seed, one figure set each."""
    rows, console = [], Console(quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        for start in STARTS:
            checkpoint, losses = None, {}
            if start != "scratch":
                checkpoint = Path(folder) / start
                overrides = [f"model.denoising={start}", f"optim.epochs={arguments.pretrain_epochs}"]
                overrides += [f"optim.lr={arguments.pretrain_lr}", "optim.batch_size=64", f"seed={seed}"]
                overrides += [*NETWORK, *OPTIM]
                pretrain(load_config(PretrainConfig, None, overrides), checkpoint, console)
                last = json.loads((checkpoint / "metrics.jsonl").read_text().splitlines()[-1])
                losses = {name: value for name, value in last.items() if name.startswith("val_")}
            for labels in arguments.labels:
                epochs = max(1, round(arguments.finetune_steps * arguments.batch_size / labels))
                overrides = [f"data.limit={labels}", f"optim.epochs={epochs}", f"seed={seed}", "loss=l1"]
                overrides += [f"optim.batch_size={arguments.batch_size}", "optim.lr=1e-3", "model.dropout=0"]
                overrides += [*NETWORK, *OPTIM]
                settings = load_config(FinetuneConfig, None, overrides)
                run = Path(folder) / f"{start}-{labels}"
                found = finetune(settings, run, console, checkpoint)["test"]
                rows.append(
                    {
                        "start": start,
                        "labels": labels,
                        "seed": seed,
                        "epochs": epochs,
                        "test_mae": found["model"]["mae"],
                        "test_mae_of_mean": found["mean"]["mae"],
                        "pretraining": losses,
                    }
                )
                print(seed, start, labels, f"{found['model']['mae']:.4f}", flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """Render mean ± standard deviation over seeds, and the paired difference to scratch."""
    lines = ["| labels | start | test MAE, eV/atom | against scratch, same seed |", "|---|---|---|---|"]
    for labels in sorted({row["labels"] for row in rows}):
        by_start = {
            start: {r["seed"]: r["test_mae"] for r in rows if (r["start"], r["labels"]) == (start, labels)}
            for start in STARTS
        }
        for start, errors in by_start.items():
            ratios = [errors[seed] / by_start["scratch"][seed] - 1 for seed in errors]
            lines.append(
                f"| {labels} | {start} | {_spread(list(errors.values()), '.4f')} | "
                f"{'' if start == 'scratch' else _spread([100 * r for r in ratios], '+.1f') + ' %'} |"
            )
    return "\n".join(lines)


def _spread(values: list[float], form: str) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):{form}} ± {deviation:{form.removeprefix('+')}}"


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--labels", type=int, nargs="+", default=[500, 3418])
    parser.add_argument("--pretrain-epochs", type=int, default=10)
    parser.add_argument("--pretrain-lr", type=float, default=1e-3)
    parser.add_argument("--finetune-steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("bench/last_denoising.json"))
    arguments = parser.parse_args()
    start = time.time()
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run_seed, arguments, seed) for seed in range(arguments.seeds)]
        rows = [row for future in futures for row in future.result()]
    print(table(rows))
    settings = {k: v for k, v in vars(arguments).items() if k not in ("output", "workers")}
    report = {
        "settings": settings | {"network": NETWORK, "optim": OPTIM},
        "device": device_name(),
        "date": time.strftime("%Y-%m-%d"),
        "minutes": (time.time() - start) / 60,
        "runs": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
