"""Scales, paths and charts."""

import json
import re

import numpy as np
import pytest
from markupsafe import Markup

from mgt_fast.report.charts import MOST_DOTS, Curve, bars, curves, histogram, parity
from mgt_fast.report.svg import Scale, decimals, element, fixed, number, path


def test_elements_escape_and_name_attributes():
    made = element("a", "<x>", Markup("<y/>"), class_='"', stroke_width=1.23456, left_out=None)
    assert made == '<a class="&#34;" stroke-width="1.23">&lt;x&gt;<y/></a>'


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.1235"), (-2.0, "−2"), (1e-7, "1e−7"), (2.5e9, "2.5e9"), (float("nan"), "nan"), (0, "0")],
)
def test_numbers_for_readers(value, text):
    assert number(value) == text


@pytest.mark.parametrize(("scale", "places"), [(0.373, 3), (37.3, 1), (3730.0, 0), (0.0, 3), (np.nan, 3)])
def test_three_digits_count(scale, places):
    assert decimals(scale) == places
    assert fixed(-1.0, decimals(0.373)) == "−1.000"


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values", [[1.0, 2.0], [3.0], [0.001, 1e4], [-1.0, 5.0], [np.nan, 2.0], [np.nan], []]
)
def test_scales_hold_their_values(values, log):
    values = np.array(values, np.float64)
    scale = Scale.over(values, 10, 200, log=log)
    places = scale(values)
    shown = places[np.isfinite(places)]
    assert ((shown >= 10) & (shown <= 200)).all()
    assert len(shown) == (np.isfinite(values) & ((values > 0) | (not log))).sum()
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 9
    assert ((scale(ticks) >= 9.99) & (scale(ticks) <= 200.01)).all()


def test_a_path_breaks_where_there_is_no_value():
    drawn = path(np.arange(4.0), np.array([1.0, np.nan, 2.0, 3.0]))
    assert drawn == "M0.0 1.0M2.0 2.0L3.0 3.0"


def test_curves_name_what_they_show():
    x = np.arange(1.0, 4.0)
    lines = [
        Curve("train", x, np.array([3.0, 2.0, 1.0]), "train"),
        Curve("val", x[1:], np.array([5.0, np.nan]), "val"),
    ]
    chart = curves("Loss", lines, "epoch", "loss", best=2, reference=(4.0, "chance"))
    assert [name for _, name in chart.legend] == ["train", "val", "best epoch, 2", "chance, 4"]
    assert "Loss: train from 3 to 1; val from 5 to 5" in chart.drawing
    readout = json.loads(Markup(re.search('data-curve="([^"]*)"', chart.drawing)[1]).unescape())
    assert readout["text"] == ["epoch 1, train 3", "epoch 2, train 2, val 5", "epoch 3, train 1, val nan"]
    assert readout["at"] == sorted(readout["at"])


def test_dots_or_cells_hold_every_crystal():
    rng = np.random.default_rng(0)
    for count in (MOST_DOTS, 40_000):
        values = rng.normal(size=count)
        chart = parity(
            "test", values, values + 0.1 * rng.normal(size=count), [f"c{i}" for i in range(count)], "test", ""
        )
        dots, cells = chart.drawing.count("<circle"), chart.drawing.count('class="cell')
        assert (dots, bool(cells)) == ((count, False) if count <= MOST_DOTS else (0, True))
        assert len(chart.drawing) < 800_000


def test_bars_of_a_histogram_count_every_value():
    values = np.array([-9.0, 0.1, 0.2, 0.9, 9.0])
    chart = histogram("residuals", values, np.linspace(-1, 1, 5), "error", "val")
    counts = [int(count) for count in re.findall(r"<title>[^<]*: (\d+)</title>", chart.drawing)]
    assert counts == [1, 2, 2]
    assert chart.note.startswith("2 values beyond the axis")


def test_bars_are_as_long_as_their_values():
    chart = bars("MAE", {"a": (1.0, "1", "test"), "b": (4.0, "4", "plain")})
    widths = [
        float(width) for width in re.findall(r'width="([\d.]+)" height="12" rx="3" class="bar', chart.drawing)
    ]
    assert widths[1] == 4 * widths[0]
