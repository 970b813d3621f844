"""The documentation says what the program does: its sessions run, its links, commands and settings exist.

`make docs` builds the pages, with warnings as errors; nothing here needs Sphinx.
"""

from __future__ import annotations

import doctest
import importlib.util
import re
from pathlib import Path

import pytest
import typer
import yaml

from mgt_fast.cli import app
from mgt_fast.data import parse
from mgt_fast.data.readers import FORMATS
from mgt_fast.train.config import FinetuneConfig, PretrainConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FILES = [
    *PAGES,
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md")),
]
SESSIONS = [path for path in PAGES if "\n>>> " in path.read_text(encoding="utf-8")]
FENCE = re.compile(r"^(`{3,}|~{3,})[^\n]*\n.*?^\1", re.MULTILINE | re.DOTALL)


def name_of(path):
    return str(path.relative_to(ROOT))


def extension(name):
    """A module of docs/_ext, which only Sphinx has on its path."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "_ext" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_links_lead_somewhere(path):
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    links = re.findall(r"\]\((?![a-z]+:|#)([^)\s#]+)", text)
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", SESSIONS, ids=name_of)
def test_session_prints_what_the_page_says(path):
    text = re.sub(r"^```.*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    session = doctest.DocTestParser().get_doctest(text, {}, path.name, str(path), 0)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failed, tried = doctest.DocTestRunner(verbose=False, optionflags=flags).run(session)
    assert tried > 0
    assert failed == 0


def test_there_are_sessions():
    assert DOCS / "python.md" in SESSIONS


def leaves(group, prefix=""):
    """Every command that does something, by its words."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaves(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


COMMANDS = dict(leaves(typer.main.get_command(app)))


def command_lines():
    """Page, command and the rest of every command line in the pages' code."""
    for path in FILES:
        for block in FENCE.finditer(path.read_text(encoding="utf-8")):
            for line in re.sub(r"\\\n", " ", block[0]).splitlines():
                for text in re.findall(r"mgt-fast ([a-z][^#\n]*)", line):
                    names = [name for name in COMMANDS if f"{text} ".startswith(f"{name} ")]
                    assert names, f"{name_of(path)}: mgt-fast {text}"
                    yield path, names[0], text.removeprefix(names[0])


def keys(config, prefix=""):
    """Dotted keys of a configuration and their defaults."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


SETTINGS = {kind: dict(keys(kind().model_dump(mode="json"))) for kind in (PretrainConfig, FinetuneConfig)}


def test_command_lines_have_options_and_settings_that_exist():
    seen = set()
    for path, name, rest in command_lines():
        seen.add(name)
        options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        assert options >= set(re.findall(r"(?<!\S)--?[a-z][\w-]*", rest)), f"{name_of(path)}: {name}{rest}"
        for key in re.findall(r"(?:--set|-s)[ =][\"']?([a-z_.]+)=", rest):
            assert any(key in settings for settings in SETTINGS.values()), f"{name_of(path)}: {key}"
    assert {"prepare", "pretrain", "finetune", "evaluate", "predict"} <= seen


def test_configuration_page_has_every_key_with_its_default():
    text = extension("generated").configuration()
    shown = dict(re.findall(r"^`+\{confval\} (\S+)\n:type: .+\n:default: (.+)\n\n\S", text, re.MULTILINE))
    assert shown.keys() == set().union(*SETTINGS.values())
    for key, default in shown.items():
        given = [settings[key] for settings in SETTINGS.values() if key in settings]
        assert all(yaml.safe_load(value) in given for value in re.findall(r"`(.*?)`", default)), key
    assert "`1.0e-05` (pretraining), `0.0005` (fine-tuning)" in shown["optim.lr"]


def test_setting_without_a_meaning_is_an_error():
    generated = extension("generated")

    class Section:
        """A section.

        Attributes:
            one, two: said
                of both.
        """

    assert generated._meaning(Section, "two") == "said of both."
    with pytest.raises(KeyError, match="Section: no docstring says what three means"):
        generated._meaning(Section, "three")


def test_command_page_has_every_command_and_option():
    text = extension("generated").command_line()
    pages = dict(re.findall(r"^## mgt-fast ([^\n]+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert list(pages) == list(COMMANDS)
    for name, command in COMMANDS.items():
        for parameter in command.params:
            shown = parameter.opts if parameter.param_type_name == "option" else [parameter.name.upper()]
            assert all(re.search(rf"\{{option\}} .*{re.escape(one)}\b", pages[name]) for one in shown), name


def test_data_page_names_every_format_and_reason():
    text = (DOCS / "data.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`([a-z_-]+)`", text))
    assert listed >= set(FORMATS)
    assert listed >= set(re.findall(r"`([a-z]+_[a-z_]+)`", parse.__doc__))


def test_relative_links_become_those_of_a_page():
    rewrite = extension("repository").rewrite_links
    assert rewrite("[a](docs/scaling.md#model)", "") == "[a](scaling.md#model)"
    assert rewrite("[a](../docs/scaling.md) ![b](results/roofline-predicted.png)", "bench") == (
        "[a](scaling.md) ![b](../bench/results/roofline-predicted.png)"
    )
    assert rewrite("[a](bench/README.md)", "") == "[a](benchmarks.md)"
    assert rewrite("[a](../configuration.md)", "docs/api", "docs/api") == "[a](../configuration.md)"
    untouched = "[a](https://example.org/x) [b](#here)\n```\n[c](nowhere.md)\n```"
    assert rewrite(untouched, "") == untouched
    with pytest.raises(FileNotFoundError, match=r"bench leads to bench/nowhere\.md"):
        rewrite("[a](nowhere.md)", "bench")


def test_docstrings_are_taken_as_plain_text():
    convert = extension("docstrings").as_restructured_text
    assert convert(["Length |r| of `a|b`."]) == [r"Length \|r\| of `a|b`."]
    assert convert(["Steps:", "", "    one"]) == ["Steps::", "", "    one"]
    assert convert(["Args:", "    x: one"]) == ["Args:", "    x: one"]
