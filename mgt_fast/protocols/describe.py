"""Recipes as the user reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.table import Table

from ..train.config import FinetuneConfig, load_config
from .recipe import ByFiles, ByFolds, ByIds, ByShuffle, NoSplit, Own, RawFile, Recipe, as_overrides


def overview(recipes: Iterable[Recipe]) -> Table:
    """Return the table that `mgt-fast protocol list` shows."""
    table = Table()
    table.add_column("protocol", no_wrap=True)
    table.add_column("crystals and property")
    table.add_column("published MAE")
    for recipe in recipes:
        best = [f"{one.model} {one.mae:g}" for one in recipe.published[:2]]
        figures = f"{', '.join(best)} {recipe.unit}" if best else ""
        table.add_row(recipe.name, recipe.title, figures)
    return table


def describe(recipe: Recipe) -> str:
    """Return all that a recipe says, as text."""
    return "\n".join(_lines(recipe))


def _lines(recipe: Recipe) -> Iterator[str]:
    yield f"{recipe.name}: {recipe.title}"
    if recipe.target is not None:
        yield f"target: {recipe.target} [{recipe.unit}]"
    yield f"parts: {_rule(recipe)}"
    for number, source in enumerate(recipe.sources, 1):
        yield "raw files:" if number == 1 else "or:"
        for file in source.all_files:
            yield f"  {_file(file)}"
        if source.column is not None:
            yield f"  target in {source.column!r}"
    if isinstance(recipe.split, ByIds):
        yield f"ids of the parts:\n  {_file(recipe.split.file)}"
    for name in recipe.variants if recipe.target else ():
        yield f"settings {name}: {_settings(recipe, name)}"
    for one in recipe.published:
        note = f"; {one.note}" if one.note else ""
        yield f"published: {one.model} {one.mae:g} {recipe.unit} ({one.source}{note})"
    for text in recipe.notes:
        yield f"note: {text}"
    for text in recipe.citation:
        yield f"cite: {text}"


def _settings(recipe: Recipe, variant: str) -> str:
    values = recipe.variant(variant)
    config = load_config(FinetuneConfig, None, as_overrides(values))
    data, optim = config.data, config.optim
    main = {
        "data.max_neighbors": f"{data.max_neighbors} neighbours",
        "data.scale_target": f"target {'scaled' if data.scale_target else 'not scaled'}",
        "optim.batch_size": f"batch {optim.batch_size}",
        "optim.lr": f"lr {optim.lr:g}",
        "optim.epochs": f"{optim.epochs} epochs",
    }
    others = [f"{key}={value}" for key, value in values.items() if key not in main]
    return ", ".join([*main.values(), *others])


def _file(file: RawFile) -> str:
    by = f"fetched by {file.client} as {file.key!r}" if file.client else ""
    return "; ".join(text for text in (file.name, by, file.url, file.note) if text)


def _sizes(recipe: Recipe) -> str:
    if recipe.sizes is not None:
        return " / ".join(f"{size:,}" for size in recipe.sizes)
    split = recipe.split
    if isinstance(split, ByFolds):
        return f"{split.folds} folds"
    if isinstance(split, ByShuffle):
        return " / ".join(f"{fraction:.0%}" for fraction in split.fractions)
    return "none" if isinstance(split, NoSplit) else "official ids"


def _rule(recipe: Recipe) -> str:
    split, sizes = recipe.split, _sizes(recipe)
    if isinstance(split, ByFolds):
        return (
            f"{split.folds} folds of KFold, random_state {split.random_state}; {split.val_fraction:.0%} of "
            f"each fold's training crystals are val, drawn with seed {split.val_seed} + fold"
        )
    if isinstance(split, NoSplit):
        return "none, the crystals are for pretraining"
    how = {
        ByIds: "by official ids",
        ByShuffle: f"shuffled with seed {getattr(split, 'seed', None)}",
        ByFiles: "a file each",
        Own: "the dataset's own",
    }
    return f"{sizes}, {how[type(split)]}"
