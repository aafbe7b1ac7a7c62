"""Suites: their runs, tables by hand, what goes on after a stop, and what is refused."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from flowbp_ray.comparing import command, runs
from flowbp_ray.comparing.page import write_page
from flowbp_ray.comparing.results import collect, half_width
from flowbp_ray.comparing.suite import Cell, Suite, cells, read
from flowbp_ray.config import loading, yaml_text
from flowbp_ray.run.folder import comparable
from flowbp_ray.utils.errors import ConfigError
from tests.artifacts.reported import Page
from tests.comparing.conftest import collected, ended


def test_each_row_and_seed_is_a_run_of_its_own(suite: Suite, tmp_path: Path) -> None:
    found = cells(suite, tmp_path / "out")
    assert [(c.row, c.seed) for c in found[:3]] == [("one", 1), ("K = 2, late", 1), ("other", 1)] and len(found) == 9
    config = found[4].load()
    assert (config.seed, config.plan_seed, config.name, config.resume) == (2, 2, "K_2_late_seed2", "auto")
    assert config.surrogate().active.k == 2 and found[4].folder == config.run_dir  # type: ignore[union-attr]


def test_the_table_is_means_over_seeds_and_marks_what_is_beyond_noise(suite: Suite, tmp_path: Path) -> None:
    found, _ = collected(suite, tmp_path)
    one = found.table["one"]["verifier"]
    values = np.array([0.50, 0.60, 0.55])
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (one.mean - (one.half or 0), one.mean + (one.half or 0)) == pytest.approx((low, high))
    marks = {row: [v.mark for v in values.values()] for row, values in found.table.items()}
    # one is 0.02, −0.02 and 0.01 from the best verifier; of the scores it is 0.1 below the best with every seed
    assert marks == {"base": ["", ""], "one": ["close", ""], "K = 2, late": ["", "best"], "other": ["best", ""]}
    assert found.table["base"]["verifier"].mean == 0.25 and found.table["base"]["verifier"].half is None
    lines = found.markdown().splitlines()
    assert lines[0] == "| | verifier | score | seeds |"
    assert lines[2] == "| base | 25.0 % | 1.000 | 3 |"  # the same in every seed: measured once
    assert not found.missing and [run["seed"] for run in found.as_json()["runs"]] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    curve = found.curves["one"]
    assert curve.steps == [0, 2] and curve.images == [0.0, 8.0] and curve.hours == [0.0, 1.0]
    assert curve.values["verifier"] == pytest.approx([0.25, 0.55])


def test_the_second_table_is_the_others_minus_the_reference_seed_by_seed(suite: Suite, tmp_path: Path) -> None:
    named = Suite.model_validate(suite.model_dump() | {"reference": "one"})
    found, all_cells = collected(named, tmp_path)
    assert list(found.differences) == ["K = 2, late", "other"]
    late = found.differences["other"]["verifier"]
    low, high = stats.ttest_rel([0.52, 0.58, 0.56], [0.50, 0.60, 0.55]).confidence_interval(0.95)
    assert (late.mean - (late.half or 0), late.mean + (late.half or 0)) == pytest.approx((low, high))
    marks = {row: [v.mark for v in values.values()] for row, values in found.differences.items()}
    assert marks == {"K = 2, late": ["clear", "clear"], "other": ["", "clear"]}
    shown = [
        "| K = 2, late | **-10.0 ± 0.0 %** | **+0.100 ± 0.000** | 3 |",
        "| other | +0.3 ± 5.2 % | **-3.100 ± 0.657** | 3 |",
    ]
    assert found.markdown().splitlines()[-2:] == shown
    tables = Page(write_page(found, all_cells, tmp_path / "page.html").read_text()).tables
    assert ["other", "+0.3 ± 5.2 %", "-3.100 ± 0.657", "3"] in [row for table in tables for row in table]
    assert collect(suite, all_cells).differences == {}


def test_a_run_that_ended_before_it_was_measured_is_missing(suite: Suite, tmp_path: Path) -> None:
    runs = cells(suite, tmp_path / "out")
    for cell in runs[:3]:
        ended(cell, 0.5, 2.0)
    summary = json.loads((runs[0].folder / "summary.json").read_text()) | {"guidance": {}}
    (runs[0].folder / "summary.json").write_text(json.dumps(summary))
    found = collect(suite, runs)
    assert "one, seed 1 (ended before guidance 1 was measured)" in found.missing and len(found.missing) == 7
    assert list(found.table) == ["base", *list(suite.rows)[1:]]


def test_one_seed_has_no_interval_and_no_second_best(suite: Suite, tmp_path: Path) -> None:
    found, all_cells = collected(suite, tmp_path, seeds=1)
    assert half_width(np.array([1.0])) is None
    assert [v["verifier"].mark for v in found.table.values()] == ["", "", "", "best"]
    assert "±" not in found.markdown() and len(found.missing) == 6
    page = Page((write_page(found, all_cells, tmp_path / "page.html")).read_text())
    assert any("base" in row[0] for table in page.tables for row in table)


def test_a_suite_goes_on_with_what_has_not_ended_and_names_what_failed(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs are replaced by a line of Python: that of seed 2 of `other` fails once."""
    found = cells(suite, tmp_path / "out")[:6]

    def launch(cell: Cell, address: str | None) -> list[str]:
        write = f"import pathlib; f = pathlib.Path({str(cell.folder)!r}); f.mkdir(); (f / 'summary.json').touch()"
        fails = (cell.row, cell.seed) == ("other", 2) and address is not None
        return [sys.executable, "-c", "raise SystemExit('no room')" if fails else write]

    monkeypatch.setattr(runs, "launch", launch)
    monkeypatch.setattr(runs, "LOOK", 0.05)
    said: list[str] = []
    failed = runs.run_all(found, 2, "there", said.append)
    assert [(f.cell.row, f.cell.seed, f.code) for f in failed] == [("other", 2, 1)]
    assert "it printed: no room" in failed[0].describe() and said[-1].endswith("6 of 6")
    again: list[str] = []
    assert runs.run_all(found, 2, None, again.append) == []
    assert again == ["5 of 6 runs are done", "other, seed 2: started", "other, seed 2: done; 6 of 6"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("seeds: [1, 2, 3]", "seeds: []"), "seeds"),
        (("name: three", "title: three"), "title"),
        (("method.k=2", "method.kk=2"), "row 'K = 2, late'.*kk"),
        (("shapes:dev", "null"), "evaluation.prompts is null"),
        (("K = 2, late", "one "), "same name"),
        (("rows:", "rows: ["), "is not a suite"),
        (("\nname: three", "- three\n#"), "is not a suite"),
        (("seeds: [1, 2, 3]", "seeds: [1, 2, 1]"), "seeds.*there twice"),
        (("seeds: [1, 2, 3]", "seeds: [-1]"), "seeds.0.*greater than or equal to 0"),
        (("name: three", "name: .."), "name: .*pattern"),
        (("one: {}", "base: {}"), "base is the row of what the runs began with"),
        (("method.k=2", "evaluation.limit=3"), r"row 'K = 2, late': evaluation.limit is 3, in 'one' 4"),
        (("method.k=2", "backbone.path=/other"), r"backbone.path is ./other., in 'one'"),
        (("columns:", "reference: two\ncolumns:"), "reference: there is no row 'two'; write one of one, "),
        (("columns:", "guidance: 5\ncolumns:"), "row 'one': nothing is evaluated at guidance 5"),
    ],
)
def test_a_wrong_suite_is_refused_before_a_run_starts(
    suite: Suite, tmp_path: Path, change: tuple[str, str], said: str
) -> None:
    file = tmp_path / "suite.yaml"
    file.write_text(file.read_text().replace(*change))
    with pytest.raises(ConfigError, match=said):
        cells(read(str(file)), tmp_path / "out")


def test_what_ended_with_other_settings_is_not_shown_as_if_it_had_these(suite: Suite, tmp_path: Path) -> None:
    collected(suite, tmp_path)
    cells(suite, tmp_path / "out")
    longer = suite.model_copy(update={"overrides": [*suite.overrides, "steps=3"]})
    with pytest.raises(ConfigError, match=r"one_seed1 is a run of another configuration \(steps was 2, is 3\)"):
        cells(longer, tmp_path / "out")
    with pytest.raises(ValueError, match="lower: 'drift' was not measured; write one of verifier, score"):
        collect(suite.model_copy(update={"lower": ["drift"]}), cells(suite, tmp_path / "out"))


def test_a_jobs_command_is_the_same_for_every_shell(suite: Suite, tmp_path: Path) -> None:
    """Ray joins it as for Windows and gives it to sh, which would expand braces and variables."""
    odd = "learners.optimizer.betas=[0.5,0.25]", "data.prompts=/a folder/{a,b} $HOME 'é'.txt"
    row = suite.rows["one"].model_copy(update={"overrides": list(odd)})
    [cell] = cells(suite.model_copy(update={"rows": {"clip 0.5": row}, "seeds": [1]}), tmp_path / "out")
    cell.folder.parent.mkdir()
    words = runs.launch(cell, "http://127.0.0.1:8265")
    own = words[words.index("--") + 1 :]
    assert all(shlex.quote(word) == word for word in own)
    assert loading.load(own[-1]) == cell.load() and own[-1].endswith("clip_0.5_seed1.yaml")


def test_the_base_is_drawn_for_all(suite: Suite, tmp_path: Path) -> None:
    """Into a folder beside the runs, where the suite says nothing else; a run is the same with and without it."""
    found = cells(suite, tmp_path / "out")
    assert {cell.load().evaluation.base_cache for cell in found} == {str(tmp_path / "out" / "base")}
    other = suite.model_copy(update={"overrides": [*suite.overrides, "evaluation.base_cache=null"]})
    plain = cells(other, tmp_path / "out")
    assert {cell.load().evaluation.base_cache for cell in plain} == {None}
    assert comparable(plain[0].load()) == comparable(found[0].load())


def test_a_table_is_made_of_what_there_is(suite: Suite, tmp_path: Path) -> None:
    """The base has what any row measured; without a common seed, or without the reference, nothing is claimed."""
    named = Suite.model_validate(suite.model_dump() | {"reference": "one"})
    runs = cells(named, tmp_path / "out")
    for cell in (runs[0], runs[4], runs[5]):  # one with seed 1, the others with seed 2
        ended(cell, 0.5, 2.0)
    summary = json.loads((runs[5].folder / "summary.json").read_text())
    del summary["guidance"]["1"]["before"]["score"]
    (runs[5].folder / "summary.json").write_text(json.dumps(summary))
    found = collect(named, runs)
    assert found.table["base"]["score"].mean == 1.0 and "| other | – | – | 0 |" in found.markdown()
    (runs[0].folder / "summary.json").unlink()
    alone = collect(named, runs)
    assert alone.differences == {} and alone.missing[-1].startswith("one, the reference, so there are no differences")


def test_suites_share_the_runs_of_common_rows(suite: Suite, tmp_path: Path) -> None:
    lines, out = list[str](), tmp_path / "out"
    for name, rows in (("first", ["one", "other"]), ("second", ["one", "K = 2, late"])):
        change = {"name": name, "runs": "shared", "seeds": [1], "rows": {row: suite.rows[row] for row in rows}}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml_text.dump(suite.model_copy(update=change).model_dump(mode="json")))
        if name == "first":
            ended(cells(read(str(file)), out / "shared")[0], 0.5, 2.0)
        command.run(str(file), out, 1, None, True, lines.append)
        assert "| one | **50.0 %** | **2.000** | 1 |" in (out / name / "table.md").read_text()
    assert "no result yet: K = 2, late, seed 1" in lines and not list((out / "shared").glob("*.md"))


def test_a_run_that_ends_without_a_summary_has_failed(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a job whose folder is on another machine. Each prints into a file of its own, points or not."""
    rows = {f"clip 0.{n}": suite.rows["one"] for n in (25, 5)}
    file, lines = tmp_path / "other.yaml", list[str]()
    file.write_text(yaml_text.dump(suite.model_copy(update={"rows": rows, "seeds": [1]}).model_dump(mode="json")))
    monkeypatch.setattr(runs, "launch", lambda cell, address: [sys.executable, "-c", f"print({cell.row!r})"])
    monkeypatch.setattr(runs, "LOOK", 0.05)
    failed = command.run(str(file), tmp_path / "out", 1, None, False, lines.append)
    assert [f.log.name for f in failed] == ["clip_0.25_seed1.log", "clip_0.5_seed1.log"]
    for each in failed:
        assert f"has no summary.json, it printed: {each.cell.row} (" in each.describe()


def test_sigterm_ends_the_runs_too(suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in sessions of their own, and would go on without anyone who reads what they print."""
    started, said = list[subprocess.Popen[bytes]](), list[str]()

    def popen(*arguments: Any, **options: Any) -> Any:
        started.append(subprocess.Popen(*arguments, **options))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    monkeypatch.setattr(runs, "launch", lambda cell, address: [sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(runs, "subprocess", SimpleNamespace(Popen=popen, TimeoutExpired=subprocess.TimeoutExpired))
    monkeypatch.setattr(runs, "LOOK", 0.05)
    with pytest.raises(KeyboardInterrupt):
        runs.run_all(cells(suite, tmp_path / "out"), 1, None, said.append)
    assert [process.poll() for process in started] == [-signal.SIGTERM]
    assert said[-1].startswith("the runs finish their steps and save")
