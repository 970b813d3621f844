"""The house rules that a reviewer would otherwise have to check by eye."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "mgt_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])

# Lower layers first; a module may import, at its top level, only from its own layer or from below.
LAYERS = [
    {"kernels", "config", "structures", "outputs"},
    {"data.elements", "graph"},
    {"layers"},
    {"model", "losses", "importer", "data", "reference"},
    {"checkpoint", "inference"},
    {"train", "plots"},
    {"cli", "demo"},
]


def module_name(path):
    if path.is_relative_to(ROOT / "kernels"):
        parts = ("kernels", *path.relative_to(ROOT / "kernels").with_suffix("").parts)
    else:
        parts = path.relative_to(ROOT / "mgt_fast").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def layer_of(name):
    for depth, names in reversed(list(enumerate(LAYERS))):
        if any(name == n or name.startswith(n + ".") for n in names if "." in n):
            return depth
    for depth, names in enumerate(LAYERS):
        if name.split(".")[0] in names:
            return depth
    return None


def own_imports(path):
    """Names of mgt_fast modules that `path` imports anywhere at module level, relative to mgt_fast."""
    name = module_name(path)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield ".".join(target) if node.module else ".".join([*target, alias.name])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mgt_fast."):
            yield node.module.removeprefix("mgt_fast.")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    name = module_name(path)
    if name == "":  # the package's own __init__ gathers the public names
        return
    own = layer_of(name)
    assert own is not None, f"give {name} a place in LAYERS"
    for target in own_imports(path):
        depth = layer_of(target)
        assert depth is not None, f"{name} imports {target}, which has no place in LAYERS"
        assert depth <= own, f"{name} imports {target} from a layer above"


def test_reference_stays_off_the_fast_path():
    for path in SOURCES:
        assert not any(t.split(".")[0] == "reference" for t in own_imports(path)), path


def test_files_stay_readable():
    sources = [*SOURCES, *(ROOT / "csrc").iterdir(), *(ROOT / "tests").rglob("*.py")]
    long = {str(p.relative_to(ROOT)): n for p in sources if (n := len(p.read_text().splitlines())) > 600}
    assert not long
