"""The report's page: what it holds, what it escapes, how large it gets."""

import json
import re
from html.parser import HTMLParser

import made_runs
import pytest
from rich.console import Console
from typer.testing import CliRunner

from mgt_fast.cli import app
from mgt_fast.report import render, write_report
from mgt_fast.report.record import read_run
from mgt_fast.train.runlog import RunLog

VOID = {"meta", "link", "br", "hr", "img", "input"}
SECTIONS = ["summary", "curves", "errors", "worst", "router", "throughput", "configuration", "environment"]


class Outline(HTMLParser):
    """Tags in order, checked to be closed in order; texts by tag."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else None, data))

    def ids(self, tag):
        return [attributes.get("id") for name, attributes in self.tags if name == tag]


def page(folder, **options):
    html = render(read_run(folder), **options)
    return html, Outline(html)


def test_every_section_of_a_finetuning_run(finished):
    html, outline = page(finished)
    assert outline.ids("section") == SECTIONS
    results = json.loads((finished / "results.json").read_text())
    assert f"{results['test']['model']['mae']:.4g}" in html
    assert f"{results['test']['median']['mae']:.4g} eV/atom" in html
    assert len([1 for tag, attributes in outline.tags if attributes.get("class") == "atom"]) > 12
    images = [
        attributes for tag, attributes in outline.tags if tag == "svg" and attributes.get("role") == "img"
    ]
    assert len(images) > 12
    assert all(attributes["aria-label"] for attributes in images)


def test_nothing_is_loaded_and_only_the_own_script_runs(finished):
    html, outline = page(finished)
    policies = [found["content"] for tag, found in outline.tags if "http-equiv" in found]
    assert [policy.partition(";")[0] for policy in policies] == ["default-src 'none'"]
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", html)
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert not any(name.startswith("on") or name == "style" for _, found in outline.tags for name in found)
    assert [tag for tag, _ in outline.tags].count("script") == 1


def test_names_and_settings_are_escaped(hostile):
    _, outline = page(hostile)
    names = [tag for tag, _ in outline.tags]
    assert (names.count("script"), names.count("style")) == (1, 1)
    assert not {"img", "b"} & set(names)
    assert not any(name.startswith("on") for _, found in outline.tags for name in found)
    shown = "".join(text for _, text in outline.texts)
    assert f"{made_runs.HOSTILE}29" in shown
    assert "a<b>&" in shown
    assert "<b>eV</b>" in shown


def test_a_large_run_makes_a_small_page(tmp_path):
    names = [f"crystal-{i}" for i in range(30_000)]
    folder = made_runs.finetuning(tmp_path / "large", epochs=500, steps=50_000, crystals=15_000, ids=names)
    html, _ = page(folder)
    assert len(html.encode()) < 3e6
    assert "number of crystals in a cell" in html
    assert "Mean of each 167 steps" in html


def test_a_run_in_progress(tmp_path):
    folder = made_runs.finetuning(tmp_path / "run", finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 7, "train_l')
    html, outline = page(folder)
    assert outline.ids("section") == [name for name in SECTIONS if name not in ("errors", "worst", "router")]
    assert "The run has not ended: 6 of 6 epochs" in html


def test_a_run_that_has_just_begun(tmp_path):
    folder = made_runs.finetuning(tmp_path / "run", finished=False)
    for name in ("metrics.jsonl", "steps.jsonl", "best.safetensors", "last.safetensors", "environment.json"):
        (folder / name).unlink()
    _, outline = page(folder)
    assert outline.ids("section") == ["summary", "configuration", "environment"]


def test_a_pretraining_run(pretrained):
    html, outline = page(pretrained)
    assert outline.ids("section") == ["summary", "curves", "throughput", "configuration", "environment"]
    assert "chance, 5.541" in html  # log(2 * 128 - 1)


def test_without_the_dataset_it_says_so(tmp_path):
    folder = made_runs.finetuning(tmp_path / "run")
    environment = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps(environment | {"dataset": "0" * 64}))
    html, outline = page(folder)
    assert "is not the dataset that the run used" in html
    assert "000000000000…" in html
    assert not any(attributes.get("class") == "atom" for _, attributes in outline.tags)

    config = (folder / "config.yaml").read_text().replace("path: null", "path: gone")
    (folder / "config.yaml").write_text(config)
    html, _ = page(folder)
    assert "the dataset gone that the run used is not there" in html


def test_as_many_worst_crystals_as_asked_for(finished):
    for worst in (0, 3):
        _, outline = page(finished, worst=worst)
        classes = [attributes.get("class") for tag, attributes in outline.tags if tag == "ul"]
        assert classes.count("crystals") == (worst > 0)
        ranks = [text for tag, text in outline.texts if tag == "span" and re.match(r"\d+\. ", text)]
        assert len(ranks) == worst


def test_the_command(finished, tmp_path):
    def invoke(*arguments):
        return CliRunner().invoke(app, ["report", *map(str, arguments)])

    first = invoke(finished)
    assert first.exit_code == 0, first.output
    assert first.output == f"written: {finished / 'report.html'}\n"
    again = invoke(finished)
    assert again.exit_code == 1
    assert "pass --overwrite" in again.output
    assert invoke(finished, "--overwrite", "--worst", 2).exit_code == 0
    for folder in (tmp_path, tmp_path / "absent"):
        absent = invoke(folder)
        assert absent.exit_code == 1
        assert "holds no run: it has no config.yaml" in absent.output
    nowhere = invoke(finished, "-o", tmp_path / "no" / "r.html")
    assert "make it first" in nowhere.output


def test_an_older_report_goes_when_the_run_is_replaced(tmp_path):
    folder = made_runs.finetuning(tmp_path / "run")
    write_report(folder, folder / "report.html")
    config = read_run(folder).config
    with pytest.raises(FileExistsError), RunLog(folder, config, Console()):
        pass
    assert (folder / "report.html").exists()
    with RunLog(folder, config, Console(), overwrite=True):
        assert not (folder / "report.html").exists()
