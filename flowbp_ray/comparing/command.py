"""`flowbp-ray compare`: run a suite, write its table, its values and its page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from flowbp_ray.comparing.figure import draw
from flowbp_ray.comparing.page import write_page
from flowbp_ray.comparing.results import collect
from flowbp_ray.comparing.runs import Failed, done, run_all
from flowbp_ray.comparing.suite import cells, read
from flowbp_ray.config import yaml_text

SUITE = "suite.yaml"
"""In a suite's folder: the suite as it was compared last."""


def run(
    file: str, out: Path, at_once: int, address: str | None, show: bool, say: Callable[[str], None]
) -> list[Failed]:
    """Run what has not ended, unless `show`, and write its table, values, figure and page; return what failed.

    Raises ConfigError, before a run starts, for a suite or a configuration that is wrong.
    """
    suite = read(file)
    out = out if address is None else out.absolute()  # a job starts elsewhere
    folder, found = out / suite.name, cells(suite, out / (suite.runs or suite.name))
    failed = [] if show else run_all(found, at_once, address, say)
    if failed and not any(map(done, found)):
        return failed
    comparison = collect(suite, found)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUITE).write_text(yaml_text.dump(suite.model_dump(mode="json", exclude_defaults=True)))
    (folder / "table.md").write_text(comparison.markdown() + "\n")
    (folder / "results.json").write_text(json.dumps(comparison.as_json(), indent=1) + "\n")
    say(comparison.markdown())
    for line in comparison.missing:
        say(f"no result yet: {line}")
    draw(comparison).savefig(folder / "figure.png")
    page = write_page(comparison, found, folder / "report.html")
    say(f"{folder}: table.md, figure.png, results.json with each run's values, and {page.name} (open it in a browser)")
    return failed


def is_suite(folder: Path) -> bool:
    """Whether `compare` wrote this folder."""
    return (folder / SUITE).is_file()


def report(folder: Path, out: Path | None = None) -> Path:
    """Write the page of a suite again, from its folder and the runs there. out: the page; None: report.html there.

    Raises ConfigError where the folder holds no suite, ValueError where no run of it has ended.
    """
    suite = read(str(folder / SUITE))
    found = cells(suite, folder.parent / (suite.runs or suite.name))
    return write_page(collect(suite, found), found, out or folder / "report.html")
