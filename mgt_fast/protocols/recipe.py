"""What a recipe says of a benchmark: where its crystals are, how they are divided, what was published.

The recipes themselves are the YAML files in `recipes/`: the name of a protocol, and the fields of `Recipe`.
A top-level key that begins with a dot holds what several recipes of the file share.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

RECIPES = Path(__file__).parent / "recipes"
PUBLISHED = "published"


class RecipeError(ValueError):
    """A protocol that there is not, or that cannot be followed; the message says what to do."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RawFile(_Model):
    """A file as it is published.

    Attributes:
        name: that it has in the raw folder, or in a folder below it.
        url: where it is published, if it can be fetched from there.
        sha256: of the file, where known; another file is refused.
        client: that fetches it, by the name `key`; see `fetch`. None: from `url`.
        key: the client's name of the data set.
        note: what else the reader should know to put it there.
    """

    name: str
    url: str | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    client: Literal["jarvis", "matminer"] | None = None
    key: str | None = None
    note: str = ""

    @model_validator(mode="after")
    def _client_has_key(self) -> Self:
        if (self.client is None) != (self.key is None):
            raise ValueError(f"{self.name}: client and key go together")
        return self

    @property
    def can_be_fetched(self) -> bool:
        """Whether a machine with internet gets it without its user."""
        return self.client is not None or self.url is not None


class IdRule(_Model):
    """How a file's own names of crystals become the official ones.

    Attributes:
        pattern: regular expression that the whole name matches; its only group is a number.
        template: official name, a format string of that number.
        plus: added to the number first.
    """

    pattern: str
    template: str
    plus: int = 0

    def __call__(self, name: str) -> str:
        """Return the official name.

        Raises:
            RecipeError: if the name does not look as expected.
        """
        match = re.fullmatch(self.pattern, name)
        if match is None:
            raise RecipeError(
                f"crystal {name!r} is not named as {self.pattern}; is this the file that the recipe names?"
            )
        return self.template.format(int(match[1]) + self.plus)


class Source(_Model):
    """One way to get at the crystals of a recipe.

    Attributes:
        files: that hold them, all of which are needed.
        labels: file with the targets of structure files, if they stand apart.
        format: of the files, as for `data.prepare`; None: recognised.
        column: that holds the target; None for crystals without one.
        ids: from the file's names of the crystals to the official ones, where they differ.
    """

    files: Annotated[tuple[RawFile, ...], Field(min_length=1)]
    labels: RawFile | None = None
    format: str | None = None
    column: str | None = None
    ids: IdRule | None = None

    @property
    def all_files(self) -> tuple[RawFile, ...]:
        """Crystals and labels."""
        return self.files if self.labels is None else (*self.files, self.labels)


class ByIds(_Model):
    """The ids of each part stand in a file, {"train": ids, "val": ids, "test": ids}."""

    rule: Literal["ids"]
    file: RawFile


class ByShuffle(_Model):
    """Crystals with the target are shuffled: train from the front, val and test from the end.

    Attributes:
        seed: of `random.Random`.
        fractions: of train, val and test, where the recipe gives no sizes.
    """

    rule: Literal["shuffle"]
    seed: int = 123
    fractions: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None


class ByFolds(_Model):
    """Folds of scikit-learn's KFold with shuffling; a part of each fold's training crystals becomes val.

    Attributes:
        folds: how many.
        random_state: of the shuffle.
        val_fraction: of the training crystals.
        val_seed: of their choice, the number of the fold added.
    """

    rule: Literal["kfold"]
    folds: Annotated[int, Field(ge=2)]
    random_state: int
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    val_seed: int = 123


class ByFiles(_Model):
    """Each part has a file of its own; names of raw files."""

    rule: Literal["files"]
    train: str
    val: str
    test: str


class Own(_Model):
    """The dataset's own parts."""

    rule: Literal["own"]


class NoSplit(_Model):
    """Crystals without labels, for pretraining."""

    rule: Literal["none"]


Split = Annotated[ByIds | ByShuffle | ByFolds | ByFiles | Own | NoSplit, Field(discriminator="rule")]


class Published(_Model):
    """A published test error.

    Attributes:
        model: whose.
        mae: in the recipe's unit; of several folds, the mean.
        source: of the figure.
        note: what it was reached with, if that matters.
    """

    model: str
    mae: PositiveFloat
    source: str
    note: str = ""


class Recipe(_Model):
    """A protocol.

    Attributes:
        name: on the command line.
        title: one line.
        target, unit: of the property, in the dataset made; None for pretraining.
        sources: ways to get at the crystals, the official one first; none for the bundled dataset.
        split: how the crystals are divided.
        sizes: official numbers of train, val and test crystals, of every fold; None: as the rule yields them.
        settings: variants of the fine-tuning settings, as dotted keys and their values over the defaults of
            `FinetuneConfig`, which are those of the MGT paper; "published" is always there.
        published: errors to compare with.
        notes: what the reader should know of data, split or settings.
        citation: of the data.
    """

    name: str
    title: str
    target: str | None = None
    unit: str = ""
    sources: tuple[Source, ...] = ()
    split: Split
    sizes: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    settings: Mapping[str, Mapping[str, Any]] = {}
    published: tuple[Published, ...] = ()
    notes: tuple[str, ...] = ()
    citation: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.target is None) != isinstance(self.split, NoSplit):
            raise ValueError("crystals without a target, and they alone, are not divided (rule: none)")
        if (not self.sources) != isinstance(self.split, Own):
            raise ValueError("the bundled dataset, and it alone, has parts of its own (rule: own)")
        if any((source.column is None) != (self.target is None) for source in self.sources):
            raise ValueError("every source names the column of the target, if there is one")
        if isinstance(self.split, ByShuffle) and (self.sizes is None) == (self.split.fractions is None):
            raise ValueError("a shuffle needs either sizes or fractions")
        return self

    @property
    def variants(self) -> dict[str, dict[str, Any]]:
        """Settings by name."""
        return {PUBLISHED: {}} | {name: dict(values) for name, values in self.settings.items()}

    @property
    def num_folds(self) -> int:
        """Number of divisions of the crystals."""
        return self.split.folds if isinstance(self.split, ByFolds) else 1

    def variant(self, name: str) -> dict[str, Any]:
        """Return the settings of a variant.

        Raises:
            RecipeError: if there is none of this name.
        """
        if name not in self.variants:
            raise RecipeError(
                f"{self.name} has no settings {name!r}; choose one of {', '.join(self.variants)}"
            )
        return self.variants[name]


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """Return settings of a recipe as `load_config` takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


@cache
def load_recipes(folder: Path = RECIPES) -> dict[str, Recipe]:
    """Return every recipe of a folder by name, in the order of its files.

    Raises:
        ValueError: for a recipe that does not fit the model.
    """
    recipes: dict[str, Recipe] = {}
    for path in sorted(folder.glob("*.yaml")):
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        for name, fields in entries.items():
            if name.startswith("."):
                continue
            if name in recipes:
                raise RecipeError(f"{path}: there are two protocols {name!r}")
            recipes[name] = Recipe(name=name, **fields)
    return recipes


def find_recipe(name: str) -> Recipe:
    """Return a recipe.

    Raises:
        RecipeError: if there is none of this name.
    """
    recipes = load_recipes()
    if name not in recipes:
        raise RecipeError(f"there is no protocol {name!r}; choose one of {', '.join(recipes)}")
    return recipes[name]
