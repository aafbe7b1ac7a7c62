"""Charts: what is drawn lies where the numbers say, and is escaped."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowbp_ray.artifacts.charts import (
    FEW,
    HEIGHT,
    POINTS,
    WIDTH,
    Mark,
    Series,
    interval_bar,
    line_chart,
    thinned,
    ticks,
)

NAN = math.nan


def points(chart: str) -> np.ndarray:
    """Centres of a chart's dots [n, 2]."""
    circles = [e for e in ET.fromstring(chart).iter() if e.tag == "circle"]
    return np.array([[float(c.get("cx", "")), float(c.get("cy", ""))] for c in circles])


def test_dots_are_an_affine_image_of_the_numbers() -> None:
    xs, ys = [0.0, 15.0, 30.0, 45.0], [0.386, 0.436, 0.442, 0.53]
    for x, axis in ((xs, 0), (ys, 1)):
        drawn = points(line_chart("share", [Series("verifier", xs, ys)], percent=True))[:, axis]
        slope, offset = np.polyfit(x, drawn, 1)
        assert np.abs(drawn - slope * np.array(x) - offset).max() < 0.11
        assert (slope > 0) == (axis == 0) and drawn.min() > 0 and drawn.max() < (WIDTH, HEIGHT)[axis]


def test_what_is_not_finite_is_a_gap() -> None:
    chart = line_chart("reward", [Series("a", [1, 2, 3, 4, 5], [0.1, 0.2, NAN, 0.3, 0.4]), Series("b", [1], [NAN])])
    [path] = [e for e in ET.fromstring(chart).iter() if e.tag == "path" and e.get("d")]
    assert path.get("d", "").count("M") == 2 and len(points(chart)) == 4 and "NaN" not in chart and "nan" not in chart
    assert line_chart("reward", [Series("b", [1, 2], [NAN, NAN])]) == "" == line_chart("reward", [])


def test_names_and_titles_are_escaped() -> None:
    bad = '"><script>alert(1)</script>'
    chart = line_chart(bad, [Series(bad, [1, 2], [1, 2], [0.5, 1], [2, 3])], bad, marks=[Mark(bad, x=1)])
    assert not {"script"} & {element.tag for element in ET.fromstring(chart).iter()}
    assert "".join(ET.fromstring(chart).itertext()).count(bad) >= 4


def test_long_lines_are_thinned_by_means_and_have_no_dots() -> None:
    ys = np.random.default_rng(0).normal(size=10 * POINTS)
    ys[:10] = NAN
    thin = thinned(Series("a", list(range(len(ys))), ys.tolist()))
    assert np.allclose(thin.ys[1:], ys.reshape(-1, 10).mean(1)[1:]) and math.isnan(thin.ys[0])
    assert len(thin.xs) == POINTS and thin.xs[0] == 4.5
    chart = line_chart("long", [Series("a", list(range(FEW + 1)), list(range(FEW + 1)))])
    assert len(points(chart)) == 0 and chart.count("<path") == 2


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_lie_within(low: float, span: float) -> None:
    got = ticks(low, low + span)
    slack = 1e-6 * max(abs(low), span)
    assert 1 <= len(got) <= 7 and all(low - slack <= t <= low + span + slack for t in got)


@pytest.mark.parametrize("value", [0.0, 5.0, -3e-7])
def test_a_single_value_has_a_chart(value: float) -> None:
    assert len(points(line_chart("one", [Series("a", [1], [value])]))) == 1


def test_an_interval_is_drawn_to_scale() -> None:
    svg = ET.fromstring(interval_bar(0.5, 0.25, 1.0, extent=1.0))
    zero, span = (e for e in svg if e.tag == "line")
    [dot] = [e for e in svg if e.tag == "circle"]
    left, middle, right = (
        float(x or "nan") - float(zero.get("x1", "nan")) for x in (span.get("x1"), dot.get("cx"), span.get("x2"))
    )
    assert (left / right, middle / right) == pytest.approx((0.25, 0.5))
