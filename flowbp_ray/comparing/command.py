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
    (folder / "table.md").write_text(comparison.markdown() + "\n")
    (folder / "results.json").write_text(json.dumps(comparison.as_json(), indent=1) + "\n")
    say(comparison.markdown())
    for line in comparison.missing:
        say(f"no result yet: {line}")
    draw(comparison).savefig(folder / "figure.png")
    page = write_page(comparison, found, folder / "report.html")
    say(f"{folder}: table.md, figure.png, results.json with each run's values, and {page.name} (open it in a browser)")
    return failed
