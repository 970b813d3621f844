import csv
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from mgt_fast.data import CrystalDataset
from mgt_fast.plots import plot_spread
from mgt_fast.studies.output import Column, Report, Table, environment, plain, write_report
from mgt_fast.train.setup import manifest_digest


def report(**changes):
    rows = [{"arm": "a|b", "mae": 0.12345, "sd": math.nan}, {"arm": "c [d]", "mae": 1.0, "extra": 3}]
    columns = [Column("arm", "arm"), Column("mae", "MAE", ".3f"), Column("sd", "sd", ".2f")]
    values = {
        "study": "trial",
        "title": "A trial",
        "tables": [Table("Errors", columns, rows)],
        "records": rows,
        "settings": {"seeds": (0, 1), "path": Path("a/b")},
        "environment": environment(torch.device("cpu"), {"target": CrystalDataset.open()}),
        "claims": ["nothing resolved"],
        "warnings": ["too few [seeds]"],
    }
    return Report(**(values | changes))


def test_a_report_leaves_its_four_files(tmp_path):
    said = io.StringIO()
    paths = write_report(
        tmp_path / "new", report(), lambda path: path.write_bytes(b"drawn"), Console(file=said, width=200)
    )
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "trial.json",
        "trial.csv",
        "trial.md",
        "trial.png",
    }
    assert paths["png"].read_bytes() == b"drawn"
    stored = json.loads(paths["json"].read_text())
    assert stored["records"][0] == {"arm": "a|b", "mae": 0.12345, "sd": None}
    assert stored["settings"] == {"seeds": [0, 1], "path": "a/b"}
    assert stored["claims"] == ["nothing resolved"]
    where = stored["environment"]
    assert where["versions"]["torch"] == torch.__version__
    assert where["datasets"]["target"]["manifest"] == manifest_digest(CrystalDataset.open())
    with paths["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["mae"] for row in rows] == ["0.12345", "1.0"]
    assert rows[0]["extra"] == ""
    text = paths["md"].read_text()
    assert "| a\\|b | 0.123 | – |" in text
    assert "**Warning**: too few [seeds]" in text
    shown = said.getvalue()
    assert "c [d]" in shown
    assert "warning: too few [seeds]" in shown
    assert str(paths["csv"]) in shown


def test_a_narrow_terminal_cuts_no_number(tmp_path):
    rows = [{f"key{i}": value for i in range(12)} for value in (0.12345, -1234.5)]
    table = Table("Wide", [Column(f"key{i}", f"mean error {i}", ".5g") for i in range(12)], rows)
    said = io.StringIO()
    write_report(tmp_path, report(tables=[table]), Path.touch, Console(file=said, width=60))
    assert (said.getvalue().count("0.12345"), said.getvalue().count("-1234.5")) == (12, 12)
    assert "…" not in said.getvalue()


def test_numbers_are_drawn_from_left_to_right(tmp_path):
    for name, x, runs in (
        ("a.png", [8, 4, 16], [[1, 2], [3], [0]]),
        ("b.png", [4, 8, 16], [[3], [1, 2], [0]]),
    ):
        plot_spread(tmp_path / name, "x", x, {"error": {"arm": runs}})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_report_replaces_the_one_before(tmp_path):
    quiet = Console(quiet=True)
    write_report(tmp_path, report(), Path.touch, quiet)
    paths = write_report(tmp_path, report(claims=["resolved"]), Path.touch, quiet)
    assert "nothing resolved" not in paths["md"].read_text()


def test_what_json_cannot_hold():
    @dataclass
    class Point:
        x: float
        y: np.ndarray

    value = {1: Point(math.inf, np.arange(2)), "b": [np.float32(0.5), np.nan, (Path("p"),)]}
    assert plain(value) == {"1": {"x": None, "y": [0, 1]}, "b": [0.5, None, ["p"]]}
    json.dumps(plain(value), allow_nan=False)
