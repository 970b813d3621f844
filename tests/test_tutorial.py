"""What docs/tutorial.md tells its readers to type works, in the order in which it stands there."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mgt_fast.cli import app
from mgt_fast.data import CrystalDataset

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run_shell(block):
    """Run the commands of a block in this process, which has imported what each would import anew."""
    outputs = []
    for line in block.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line)
        assert program == "mgt-fast", line
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{line}\n{result.output}{result.exception!r}"
        outputs.append(result.output)
    return "".join(outputs)


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The folder of a reader who did as the page says, and what each command printed."""
    folder = tmp_path_factory.mktemp("tutorial")
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for kind, block in BLOCKS:
            if kind == "sh":
                printed.append(run_shell(block))
            else:
                exec(compile(block, PAGE.name, "exec"), {"__name__": "__main__"})
    return folder, printed


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_command_of_the_path_is_there():
    commands = [re.match(r"mgt-fast (\S+)", block)[1] for kind, block in BLOCKS if kind == "sh"]
    assert commands == ["prepare", "pretrain", "finetune", "evaluate", "predict"]


def test_dataset_holds_every_crystal_and_the_named_parts(followed):
    folder, printed = followed
    assert "54 crystals stored of 54 read, 0 rejected" in printed[0]
    mine = CrystalDataset.open(folder / "mine")
    assert {part: len(mine.part(part)) for part in ("train", "val", "test")} == {
        "train": 36, "val": 9, "test": 9,
    }  # fmt: skip
    assert mine.target_units == {"band_gap": "eV"}
    bundled = CrystalDataset.open()
    labels = dict(zip(bundled.ids, bundled.targets["band_gap"], strict=True))
    assert list(mine.targets["band_gap"]) == [labels[name] for name in mine.ids]


def test_run_folder_is_as_the_page_says(followed):
    folder, printed = followed
    assert "weights from runs/pre" in printed[2]
    named = re.findall(r"`([\w./]+)`", PAGE.read_text().split("| in `runs/gap` |")[1].split("\n\n")[0])
    assert {"best.safetensors", "results.json", "config.yaml", "checkpoints/"} <= set(named)
    assert all((folder / "runs" / "gap" / name).exists() for name in named)


def test_tables_hold_every_crystal(followed):
    folder, printed = followed
    test = rows_of(folder / "test.csv")
    parts = {row["id"]: row["split"] for row in rows_of(folder / "parts.csv")}
    assert {row["id"] for row in test} == {name for name, part in parts.items() if part == "test"}
    error = np.mean(
        [abs(float(row["reference band_gap [eV]"]) - float(row["prediction band_gap [eV]"])) for row in test]
    )
    assert f"MAE {error:.6g} eV" in printed[3]
    predicted = rows_of(folder / "predictions.csv")
    assert {row["id"] for row in predicted} == {path.stem for path in (folder / "new").iterdir()}
    for row in predicted:
        assert float(row["se3_contribution"]) + float(row["so3_contribution"]) == pytest.approx(1)
