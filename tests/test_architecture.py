"""The house rules that a reviewer would otherwise have to check by eye."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "mgt_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])

# Lower layers first; a module may import only from its own layer or from below.
LAYERS = [
    {
        "kernels",
        "config",
        "structures",
        "distributed",
        "elements",
        "cuda_module",
        "durable",
        "profiling",
        "roofs",
        "target_scaling",
        "_C",
    },
    {"frames_cuda", "graph", "neighbors_cuda"},
    {"layers", "memory", "outputs", "padding"},
    {"model", "losses", "importer", "data", "reference"},
    {"checkpoint", "inference", "predictions"},
    {"train", "plots"},
    {"report", "studies"},
    {"protocols"},
    {"cli", "demo"},
]
DEPTH = {name: depth for depth, names in enumerate(LAYERS) for name in names}
# Methods of MGT that hand over to the layer above, when they are called.
UPWARD = {("model", "checkpoint"), ("model", "inference")}


def module_name(path):
    if path.is_relative_to(ROOT / "kernels"):
        parts = ("kernels", *path.relative_to(ROOT / "kernels").with_suffix("").parts)
    else:
        parts = path.relative_to(ROOT / "mgt_fast").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def own_imports(path):
    """Top-level names below mgt_fast that `path` imports, at its top level or inside a function."""
    name = module_name(path)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = ["mgt_fast", *package][: len(package) + 2 - node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            targets = [[*base, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        else:
            continue
        yield from (target[1] for target in targets if target[0] == "mgt_fast" and len(target) > 1)


def test_imports_are_seen(tmp_path):
    file = ROOT / "mgt_fast" / "data" / "store.py"  # for its place in the tree
    source = """
import mgt_fast.train
from mgt_fast import model
from ..cli import app
from .. import demo
def late():
    from mgt_fast.reference import ReferenceMGT
"""
    path = type("File", (), {"read_text": lambda _: source, "name": file.name})()
    path.is_relative_to, path.relative_to = file.is_relative_to, file.relative_to
    assert sorted(own_imports(path)) == ["cli", "demo", "model", "reference", "train"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    own = module_name(path).split(".")[0]
    if own == "":  # the package's own __init__ gathers the public names
        return
    assert own in DEPTH, f"give {own} a place in LAYERS"
    for target in set(own_imports(path)) - {own}:
        assert target in DEPTH, f"{own} imports {target}, which has no place in LAYERS"
        assert DEPTH[target] <= DEPTH[own] or (own, target) in UPWARD, f"{own} imports {target} from above"


def test_reference_stays_off_the_fast_path():
    importers = {module_name(path) for path in SOURCES if "reference" in own_imports(path)}
    assert importers <= {"reference"}


def test_files_stay_readable():
    sources = [*SOURCES, *(ROOT / "csrc").iterdir(), *(ROOT / "tests").rglob("*.py")]
    long = {str(p.relative_to(ROOT)): n for p in sources if (n := len(p.read_text().splitlines())) > 600}
    assert not long
