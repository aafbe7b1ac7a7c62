"""The figure and the page of a suite."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from typer.testing import CliRunner

from flowbp_ray.cli import app
from flowbp_ray.comparing import command
from flowbp_ray.comparing.figure import draw
from flowbp_ray.comparing.suite import Suite, cells, read
from flowbp_ray.config import yaml_text
from flowbp_ray.utils.errors import ConfigError
from tests.comparing.conftest import VALUES, collected, ended


def test_the_figure_has_each_seed_and_the_mean_with_its_interval(suite: Suite, tmp_path: Path) -> None:
    figure = draw(collected(suite, tmp_path)[0])
    verifier, score = figure.axes
    assert [label.get_text() for label in verifier.get_yticklabels()] == list(suite.rows)
    seeds = [line for line in verifier.get_lines() if line.get_label() == "a seed"]
    for at, (row, line) in enumerate(zip(suite.rows, seeds, strict=True)):
        assert list(line.get_xdata()) == pytest.approx([100 * verdict for verdict, _ in VALUES[row]])
        assert set(line.get_ydata()) == {at}
    half = stats.sem([3.0, 3.5, 3.1]) * stats.t.ppf(0.975, 2)
    [[low, high]] = [bars.get_segments()[0][:, 0] for bars in score.collections[:1]]
    assert (low, high) == pytest.approx((3.2 - half, 3.2 + half))
    assert [panel.get_title() for panel in figure.axes] == ["verifier, %\nbase: 25.0", "score\nbase: 1.000"]


def test_the_page_has_the_suites_figures_and_is_written_again(suite: Suite, tmp_path: Path) -> None:
    """A figure is in the page, and what is no picture is refused by name. The command takes a suite's folder."""
    Image.new("RGB", (40, 30), (10, 200, 30)).save(tmp_path / "lab.png")
    plain = suite.model_dump(mode="json") | {
        "figures": {"A method's gradient": str(tmp_path / "lab.png")},
        "seeds": [1],
    }
    file, folder = tmp_path / "with.yaml", tmp_path / "out" / "three"
    file.write_text(yaml_text.dump(plain))
    for cell in cells(read(str(file)), folder):
        ended(cell, 0.5, 2.0)
    command.run(str(file), tmp_path / "out", 1, None, True, lambda line: None)
    page = (folder / "report.html").read_text()
    [url] = re.findall(r'alt="A method&#x27;s gradient" src="data:image/webp;base64,([^"]+)"', page)
    assert page.count("A method&#x27;s gradient") == 2  # the caption too, and not escaped again
    assert np.asarray(Image.open(io.BytesIO(base64.b64decode(url))))[0, 0].tolist() == [10, 200, 30]
    (folder / "report.html").unlink()
    done = CliRunner().invoke(app, ["report", str(folder)])
    assert done.exit_code == 0 and "report.html: open it in a browser" in done.output.replace("\n", "")
    assert (folder / "report.html").read_text() == page
    (tmp_path / "lab.png").write_text("no picture")
    with pytest.raises(ConfigError, match=r"figures: .A method's gradient.: .*lab\.png cannot be read as a picture"):
        read(str(file))
