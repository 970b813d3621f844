"""The predictions of a run as they are read back."""

import numpy as np
import pytest

from mgt_fast.inference import PredictionTable, write_table
from mgt_fast.predictions import read_predictions


def table(**changes):
    values = {
        "ids": ("0012", 'a "quoted", id'),
        "prediction": np.array([0.1, -2.5e-8]),
        "contributions": np.array([[0.25, 0.75], [1.0, 0.0]]),
        "target": "band gap [PBE]",
        "unit": "eV",
    }
    return PredictionTable(**values | changes)


@pytest.mark.parametrize("changes", [{}, {"contributions": None}, {"unit": None, "target": "gap"}])
def test_what_was_written_is_read(tmp_path, changes):
    written, reference = table(**changes), np.array([0.3, 1.0])
    write_table(tmp_path / "p.csv", written.columns(reference, "test"))
    read = read_predictions(tmp_path / "p.csv")
    assert (tuple(read.ids), tuple(read.part)) == (written.ids, ("test", "test"))
    assert (read.target, read.unit) == (written.target, written.unit)
    np.testing.assert_array_equal(read.reference, reference)
    np.testing.assert_array_equal(read.error, written.prediction - reference)
    if written.contributions is None:
        assert read.contributions is None
    else:
        np.testing.assert_array_equal(read.contributions, written.contributions)


HEADER = "id,part,reference gap [eV],prediction gap [eV]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its columns are none"),
        ("id,prediction gap\na,1\n", "its columns are id, prediction gap"),
        (HEADER + "a,test,1,2\nb,test,1\n", "line 3: 3 values for 4 columns"),
        (HEADER + "a,test,1,high\n", r"column 'prediction gap \[eV\]': .*'high'"),
        (b"\xff\xfe\x00", "no CSV table"),
    ],
)
def test_damage_is_named(tmp_path, text, message):
    (tmp_path / "p.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_predictions(tmp_path / "p.csv")


def test_a_table_without_rows(tmp_path):
    (tmp_path / "p.csv").write_text(HEADER)
    assert len(read_predictions(tmp_path / "p.csv").error) == 0
