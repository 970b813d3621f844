"""What the runs of a study share: a fine-tuning configuration and a pretraining that fits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..checkpoint import load_checkpoint
from ..train.config import CONFIG_DIR, ConfigError, FinetuneConfig, PretrainConfig, RunConfig, load_config
from ..train.setup import ENCODER_SIZES, GRAPH_KEYS, values_from_checkpoint

_MACHINE = ("device", "backend", "precision", "threads", "memory_gib")
_CRYSTALS = ("path", "fractions", "split_file")
Config = TypeVar("Config", bound=RunConfig)


@dataclass(frozen=True)
class Recipe:
    """The configurations from which a study makes those of its runs.

    Attributes:
        finetuning: of the fine-tuning runs.
        pretraining: of the pretraining runs: same network, same graphs, same machine.
    """

    finetuning: FinetuneConfig
    pretraining: PretrainConfig


def load_recipe(
    config: str | None = None,
    overrides: Sequence[str] = (),
    pretraining: str | None = None,
    pretraining_overrides: Sequence[str] = (),
    *,
    start: Path | None = None,
    same_crystals: bool = True,
) -> Recipe:
    """Read the configurations of a study.

    Sizes of the network, views and graphs are those of the fine-tuning configuration; what that leaves out
    comes from the checkpoint `start`, or from the pretraining configuration. The pretraining takes them over,
    and the crystals with their parts unless it names its own, and the machine.

    Args:
        config: of fine-tuning: a file, or the name of a packaged one.
        overrides: "a.b=c" over it.
        pretraining: of pretraining; None takes the partner of a packaged `config`, as demo_pretrain of
            demo_finetune, or the defaults.
        pretraining_overrides: "a.b=c" over it.
        start: checkpoint that runs start from.
        same_crystals: False if the pretraining has a dataset of its own, the bundled one among them.

    Raises:
        ConfigError: as `load_config`; if the pretraining's settings contradict those of fine-tuning.
        CheckpointError: as `load_checkpoint`.
    """
    first = load_config(PretrainConfig, pretraining or _partner(config), pretraining_overrides)
    if start is not None:
        base = values_from_checkpoint(load_checkpoint(start)[1])
    else:
        base = {
            "model": {name: getattr(first.model, name) for name in (*ENCODER_SIZES, "views")},
            "data": {name: getattr(first.data, name) for name in GRAPH_KEYS},
        }
    finetuning = load_config(FinetuneConfig, config, overrides, base)
    own_crystals = not same_crystals or first.data.path is not None
    return Recipe(
        finetuning, fit_pretraining(first, finetuning, pretraining_overrides, own_crystals=own_crystals)
    )


def fit_pretraining(
    pretraining: PretrainConfig,
    finetuning: FinetuneConfig,
    overrides: Sequence[str] = (),
    *,
    own_crystals: bool = True,
) -> PretrainConfig:
    """Return a pretraining of the network, graphs and machine of a fine-tuning configuration.

    Args:
        pretraining: to start from.
        finetuning: gives the shared settings.
        overrides: win over them.
        own_crystals: False takes the crystals and their parts from `finetuning` as well.

    Raises:
        ConfigError: if the overrides contradict what both must have in common.
    """
    values, given = (config.model_dump(mode="json") for config in (pretraining, finetuning))
    values |= {name: given[name] for name in _MACHINE}
    values["model"] |= {name: given["model"][name] for name in (*ENCODER_SIZES, "views")}
    values["data"] |= {name: given["data"][name] for name in GRAPH_KEYS + (() if own_crystals else _CRYSTALS)}
    fitted = load_config(PretrainConfig, None, overrides, values)
    pairs = {
        f"model.{name}": (getattr(fitted.model, name), getattr(finetuning.model, name))
        for name in (*ENCODER_SIZES, "views")
    }
    pairs |= {
        f"data.{name}": (getattr(fitted.data, name), getattr(finetuning.data, name)) for name in GRAPH_KEYS
    }
    faults = [
        f"{key} = {a} for pretraining and {b} for fine-tuning" for key, (a, b) in pairs.items() if a != b
    ]
    if faults:
        raise ConfigError(
            f"{'; '.join(faults)}: set them for fine-tuning alone (--set), which both runs take"
        )
    return fitted


def changed(config: Config, *overrides: str) -> Config:
    """Return a configuration with some keys replaced: "a.b=c" each."""
    return load_config(type(config), None, overrides, config.model_dump(mode="json"))


def _partner(config: str | None) -> str | None:
    """Return the packaged pretraining configuration that belongs to a packaged one of fine-tuning."""
    if config is None or Path(config).is_file():
        return None
    name = config.replace("finetune", "pretrain")
    return name if name != config and (CONFIG_DIR / f"{name}.yaml").is_file() else None
