"""Run configurations: what `mgt-fast pretrain` and `mgt-fast finetune` read, check and write back.

A run is described by the defaults below (the published settings), a YAML file over them and `--set a.b=c`
over both. Unknown keys, wrong types and values out of range are errors that name the key.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from ..config import MGTConfig
from ..graph import SHELL_TOLERANCE

CONFIG_DIR = Path(__file__).parent.parent / "configs"
_LARGEST_FILE = 2**18  # bytes
_MOST_FAULTS = 20  # in one message


class ConfigError(ValueError):
    """A run configuration that cannot be used; the message names each key at fault."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class DataConfig(_Section):
    """The crystals of a run and how their graphs are built.

    Attributes:
        path: prepared dataset (see `mgt-fast prepare`); null is the bundled Materials Project set.
        max_neighbors: nearest neighbours an atom is given at least; shells are kept whole.
        compat: "comformer" builds the graphs of the published program, null those of `graph.build_graph`.
        shell_tolerance: relative width of a shell: distances no farther apart count as equal.
        fractions: null uses the dataset's own train/val/test parts; three numbers adding up to 1 draw
            parts at random (with `seed`) instead.
        split_file: file that names the crystals of each part, instead of the dataset's own parts: JSON
            {"train": ids, "val": ids, "test": ids} or a csv with the columns id and split. Crystals that it
            does not name are in no part.
        limit: keep at most this many crystals of each part, drawn with `seed` (for a quick try).
        resident: hold the crystals of a run in the memory of the CUDA device, where their graphs are built;
            null: if they fit.
    """

    path: Path | None = None
    max_neighbors: PositiveInt = 25
    compat: Literal["comformer"] | None = None
    shell_tolerance: Annotated[float, Field(ge=0, lt=1)] = SHELL_TOLERANCE
    fractions: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] | None = None
    split_file: Path | None = None
    limit: PositiveInt | None = None
    resident: bool | None = None

    @field_validator("fractions")
    @classmethod
    def _adds_up(cls, fractions):
        if fractions is not None and abs(sum(fractions) - 1) > 1e-6:
            raise ValueError(f"the fractions {list(fractions)} add up to {sum(fractions):g}, not to 1")
        return fractions

    @model_validator(mode="after")
    def _one_division(self) -> Self:
        if self.fractions is not None and self.split_file is not None:
            raise ValueError(
                f"fractions = {list(self.fractions)} and split_file = {self.split_file} both divide the "
                "crystals into parts; set one of them to null"
            )
        return self


class PretrainDataConfig(DataConfig):
    """Crystals of a pretraining run.

    Attributes:
        train: parts to learn from; "" holds the crystals that are in no official part. The val and test
            parts are left out unless named here.
        held_out: part on which the losses are reported.
    """

    train: Annotated[tuple[Literal["train", "val", "test", ""], ...], Field(min_length=1)] = ("train", "")
    held_out: Literal["train", "val", "test"] = "val"

    @model_validator(mode="after")
    def _disjoint(self) -> Self:
        if self.held_out in self.train:
            raise ValueError(f"held_out = {self.held_out!r} is also one of the train parts {self.train}")
        return self


class FinetuneDataConfig(DataConfig):
    """Crystals and target of a fine-tuning run.

    Attributes:
        target: name of the property to learn.
        transform: "log" learns the logarithm of the target, which must be positive; predictions and errors
            stay those of the target itself.
        scale_target: learn (value − mean) / standard deviation of the training part, of the target or its
            logarithm; the published runs do so for every target but the bulk and shear moduli.
    """

    target: str = "formation_energy_per_atom"
    transform: Literal["none", "log"] = "none"
    scale_target: bool = True


class OptimConfig(_Section):
    """AdamW, a linear warm-up and a cosine down to zero, both counted in steps.

    Attributes:
        lr: learning rate at the end of the warm-up.
        weight_decay: AdamW's decoupled weight decay.
        epochs: passes over the training crystals.
        warmup_epochs: length of the warm-up; need not be whole.
        batch_size: crystals in a step, over all ranks, at most (see `plan.batch_bounds`).
        grad_clip: largest norm of the whole gradient; null does not clip.
        ema: decay a step of the moving average of weights and running statistics that is validated and
            saved in place of the last step's own; null: no average.
        statistics: of BatchNorm: "global": of all the step's crystals, however ranks and memory divide them;
            "local": of those that are worked on together, which saves exchanges but depends on the division.
    """

    lr: PositiveFloat
    weight_decay: NonNegativeFloat = 0.01
    epochs: PositiveInt
    warmup_epochs: NonNegativeFloat
    batch_size: Annotated[int, Field(ge=2)]
    grad_clip: PositiveFloat | None = None
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    statistics: Literal["global", "local"] = "global"

    @model_validator(mode="after")
    def _reaches_peak(self) -> Self:
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs = {self.warmup_epochs:g} is longer than the run, epochs = {self.epochs}, "
                "which would never reach lr; set both"
            )
        return self


class PretrainingConfig(_Section):
    """The pretraining losses.

    Attributes:
        noise_std: standard deviation of the noise on angle cosines and on edge vectors (Å).
        temperature: of the contrastive loss.
        contrastive_weight, se3_weight, so3_weight: weights of NT-Xent and of the two denoising losses.
    """

    noise_std: PositiveFloat = 0.05
    temperature: PositiveFloat = 1.0
    contrastive_weight: NonNegativeFloat = 1.0
    se3_weight: NonNegativeFloat = 0.5
    so3_weight: NonNegativeFloat = 0.5


class EarlyStoppingConfig(_Section):
    """When to stop before the last epoch.

    Attributes:
        patience: epochs without a better val MAE after which to stop; null runs to the end.
        min_delta: by how much a val MAE must be better to count, in the target's units.
    """

    patience: PositiveInt | None = None
    min_delta: NonNegativeFloat = 0.0


class RouterMonitorConfig(_Section):
    """When to warn that the router stagnates; see `stagnation`.

    Attributes:
        epochs: how many in a row it must stand still; null never warns.
        even: largest distance of the mean share from 1/2 that counts as even.
        spread: largest standard deviation of the shares that counts as the same for all crystals.
        one_view: share of a view from which on a prediction, or the mean of all, counts as that view's alone.
    """

    epochs: PositiveInt | None = 5
    even: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    spread: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    one_view: Annotated[float, Field(gt=0.5, le=1)] = 0.95


class CheckpointConfig(_Section):
    """When the state that `--resume` continues from is saved, beside the end of every epoch.

    Attributes:
        every_steps: after so many steps; null: not within an epoch.
        every_minutes: after so long; null: not within an epoch.
        keep: states to keep.
    """

    every_steps: PositiveInt | None = None
    every_minutes: PositiveFloat | None = 30.0
    keep: PositiveInt = 2


class RunConfig(_Section):
    """What both kinds of run share.

    Attributes:
        seed: of weights, dropout, shuffling, noise and random parts.
        device: "auto" takes a CUDA device if there is one.
        backend: of the model's operations; "auto" takes Triton on a CUDA device and PyTorch elsewhere.
        precision: of the factors of matrix products in training: "float32"; "tf32", which needs a recent GPU;
            "bf16", bfloat16 autocast. Parameters, sums and statistics stay float32, and so does validation.
        threads: CPU threads of torch; null leaves torch's choice.
        memory_gib: what a training step may take on each rank, GiB; a larger share of a batch is worked on
            with layers computed again, or in pieces. Null: 85 % of the CUDA device's memory, or half of the
            machine's (of its control group's, if that is less) divided by its ranks.
        tensorboard: also write TensorBoard event files.
    """

    model: MGTConfig
    optim: OptimConfig
    seed: NonNegativeInt = 123
    device: Literal["auto", "cpu", "cuda"] = "auto"
    backend: Literal["auto", "torch", "triton"] = "auto"
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    threads: PositiveInt | None = None
    memory_gib: PositiveFloat | None = None
    tensorboard: bool = False
    checkpoint: CheckpointConfig = CheckpointConfig()


def _of_task(model: Any, task: str) -> Any:
    """Fill in the network's task, which the command decides."""
    if isinstance(model, Mapping):
        if model.get("task", task) != task:
            raise ValueError(f"task = {model['task']!r}, but this command trains task {task!r}")
        return {**model, "task": task}
    return model


class PretrainConfig(RunConfig):
    """A pretraining run; the defaults are the published settings where the paper states them."""

    data: PretrainDataConfig = PretrainDataConfig()
    model: MGTConfig = MGTConfig(task="pretrain")
    optim: OptimConfig = OptimConfig(lr=1e-5, epochs=200, warmup_epochs=10, batch_size=128)
    pretraining: PretrainingConfig = PretrainingConfig()

    @field_validator("model", mode="before")
    @classmethod
    def _task(cls, model):
        return _of_task(model, "pretrain")


class FinetuneConfig(RunConfig):
    """A fine-tuning run; the defaults are the published settings where the paper states them.

    Attributes:
        start: checkpoint or run folder to take pretrained weights from (`--from`); null: from scratch.
        loss: on the (scaled) targets; "huber" turns from square to linear at one standard deviation.
        capture: pad batches to few sizes and replay each step as CUDA graphs, which is meant for small
            batches; needs a CUDA device and the Triton backend. Not yet run on a GPU.
    """

    data: FinetuneDataConfig = FinetuneDataConfig()
    model: MGTConfig = MGTConfig()
    optim: OptimConfig = OptimConfig(lr=5e-4, epochs=500, warmup_epochs=10, batch_size=16)
    start: Path | None = None
    loss: Literal["mse", "l1", "huber"] = "mse"
    capture: bool = False
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    router_monitor: RouterMonitorConfig = RouterMonitorConfig()

    @field_validator("model", mode="before")
    @classmethod
    def _task(cls, model):
        return _of_task(model, "predict")


Config = TypeVar("Config", bound=RunConfig)


def load_config(
    kind: type[Config],
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    base: Mapping[str, Any] | None = None,
) -> Config:
    """Read and check a run configuration.

    Args:
        kind: `PretrainConfig` or `FinetuneConfig`.
        path: YAML file, or the name of one that comes with the package ("demo_pretrain"); None for none.
        overrides: "a.b=value" each, the value in YAML; they win over the file, later ones over earlier.
        base: values that the file and the overrides may replace (what a checkpoint prescribes).

    Raises:
        ConfigError: naming the file and the keys at fault, with close matches of unknown keys.
    """
    values = _merge(kind().model_dump(), base or {})
    if path is not None:
        values = _merge(values, _read_yaml(_find(path)))
    for override in overrides:
        values = _merge(values, _parse_override(override))
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        where = f"configuration {path}" if path is not None else "configuration"
        lines = [_describe(kind, detail) for detail in error.errors()[:_MOST_FAULTS]]
        if error.error_count() > _MOST_FAULTS:
            lines.append(f"and {error.error_count() - _MOST_FAULTS} more")
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None


def dump_config(config: RunConfig) -> str:
    """Return the resolved configuration as YAML, which `load_config` reads back equal."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _find(path: str | Path) -> Path:
    if Path(path).is_file():
        return Path(path)
    bundled = CONFIG_DIR / f"{path}.yaml"
    if bundled.is_file():
        return bundled
    names = ", ".join(sorted(p.stem for p in CONFIG_DIR.glob("*.yaml")))
    raise ConfigError(f"no configuration file {str(path)!r}; the package's own are {names}")


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice instead of keeping the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):  # the others are refused below
                if key in seen:
                    raise ConfigError(f"{node.start_mark.name}: key {key!r} is given twice")
                seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict:
    if (size := path.stat().st_size) > _LARGEST_FILE:
        raise ConfigError(f"{path} has {size} bytes; a configuration has {_LARGEST_FILE} at most")
    try:
        with path.open(encoding="utf-8") as file:
            values = yaml.load(file, _UniqueKeyLoader)  # a SafeLoader
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; expected sections such as 'optim:'")
    return values


def _parse_override(text: str) -> dict:
    """Turn "a.b=1" into {"a": {"b": 1}}."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {text!r}: expected section.key=value, for example optim.lr=1e-3")
    try:
        nested = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--set {key}={value:.100}: the value is not valid YAML: {error}") from None
    for part in reversed(parts):
        nested = {part: nested}
    return nested


def _merge(base: Mapping, over: Mapping) -> dict:
    """Merge nested mappings; `over` wins."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            value = _merge(merged[key], value)
        merged[key] = value
    return merged


def _known_keys(kind: type, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a configuration class."""
    if issubclass(kind, BaseModel):
        types = {name: field.annotation for name, field in kind.model_fields.items()}
    else:
        types = {field.name: None for field in dataclasses.fields(kind)}
    for name, annotation in types.items():
        yield prefix + name
        if isinstance(annotation, type) and (
            issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)
        ):
            yield from _known_keys(annotation, f"{prefix}{name}.")


def _describe(kind: type, detail: Mapping) -> str:
    """Say in one phrase what pydantic found wrong with one key."""
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = list(_known_keys(kind))
        close = difflib.get_close_matches(key, known, n=3, cutoff=0.75)
        close += [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2] and k not in close]
        return f"unknown key {key!r}" + (f" (did you mean {', '.join(close)}?)" if close else "")
    message = detail["msg"].removeprefix("Value error, ")
    given = detail["input"]
    if detail["type"] == "missing":
        return f"{key} is missing"
    if isinstance(given, str | int | float | bool | None):
        return f"{key} = {given!r}: {message}"
    return f"{key}: {message}"
