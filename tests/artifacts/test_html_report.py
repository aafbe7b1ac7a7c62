"""The page of a run: its numbers, that it needs no network, that prompts stay text, and runs that are not complete."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from flowbp_ray.artifacts.html_report import write_report
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.control.guard import HackingVerdict
from flowbp_ray.run.folder import Run
from flowbp_ray.run.pictures import read_grid, save_grid
from tests.artifacts.reported import EVIL, TEXTS, Page, config_of, made_evaluation, made_pictures, made_run
from tests.test_cli import call

LIMIT = 3_000_000  # bytes


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return config_of(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def run(config: RunConfig) -> Run:
    """A finished run. Tests must not write to it."""
    return made_run(config)


@pytest.fixture(scope="module")
def page(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_report(run.folder, tmp_path_factory.mktemp("out") / "page.html").path.read_text())


def page_of(run: Run) -> Page:
    return Page(write_report(run.folder).path.read_text())


def numbers(cell: str) -> list[float]:
    return [float(n) for n in re.findall(r"[+-]?\d+(?:\.\d+)?", cell)]


def test_the_page_needs_no_network_and_runs_only_its_own_script(page: Page, run: Run) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert not any(name.startswith("on") for name in attributes), attributes
        for name in ("src", "href", "srcset", "xlink:href", "action", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:image/webp;base64,"))
    style = "".join(page.texts["style"])
    assert "url(" not in style and "@import" not in style
    [policy] = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    [script] = page.texts["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert not {"alert", "http:", "https:", "fetch", "import"} & set(re.split(r"\W+", script))


def test_prompts_stay_text(page: Page, run: Run) -> None:
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 1
    assert not [a for tag, a in page.tags if tag == "img" and "example.org" in a["src"]]
    assert len([tag for tag, _ in page.tags if tag == "h1"]) == 1
    captions = page.texts["figcaption"]
    assert all(captions.count(text) == 2 for text in TEXTS)  # once at each guidance
    labels = [a["aria-label"] for tag, a in page.tags if tag == "input" and "aria-label" in a]
    assert labels == [f"before and after: {text}" for text in TEXTS] * 2


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_tables_are_means_with_intervals_of_the_pictures_values(page: Page, guidance: float) -> None:
    """Against scipy, from the values that the run was made of, and against summary.json's lines in metrics.jsonl."""
    skills = ["colour", "counting"] * 3
    before, after = (made_evaluation(step, guidance, skills).values for step in (0, 4))
    table = [t for t in page.tables if t[0][-1] == "interval of the change"][guidance != 1.0]
    rows = {row[0].strip(): row for row in table[1:]}
    for name in ("shapes_clip", "shapes_clip_heldout", "verifier", "colour", "counting"):
        row = rows["shapes_clip  trained on" if name == "shapes_clip" else name]
        key = "verifier" if name in skills else name
        mine = [i for i, skill in enumerate(skills) if name not in skills or skill == name]
        scale, digits = (100, 0.06) if key == "verifier" else (1, 6e-5)
        x, y = before[key][mine], after[key][mine]
        assert [numbers(row[i])[0] for i in (1, 2)] == pytest.approx([scale * x.mean(), scale * y.mean()], abs=digits)
        delta = y - x
        low, high = stats.norm.interval(0.95, loc=delta.mean(), scale=stats.sem(delta)) if delta.any() else (0, 0)
        assert numbers(row[3]) == pytest.approx([scale * v for v in (delta.mean(), low, high)], abs=digits)
        assert row[4].strip() == ("above zero" if low > 0 else "below zero" if high < 0 else "contains zero")
    assert rows["colour entropy bits"][4].strip() == "no interval"
    assert [numbers(rows["colour entropy bits"][i]) for i in (1, 2)] == [[2.9], [2.5]]


def test_the_tables_agree_with_the_log(page: Page, run: Run) -> None:
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    table = next(t for t in page.tables if t[0][-1] == "interval of the change")
    rows = {row[0].strip().removesuffix("  trained on").replace(" ", "_"): row for row in table[1:]}
    ends = {line["step"]: line for line in lines if line["kind"] == "evaluation" and line["guidance"] == 1.0}
    for name, row in rows.items():
        key = name if name in ends[0] else f"verifier/{name}"
        scale = 100 if key.startswith("verifier") else 1
        assert [numbers(row[i])[0] for i in (1, 2)] == pytest.approx([scale * ends[s][key] for s in (0, 4)], abs=0.06)
    speeds = sorted(line["images_per_s"] for line in lines if line["kind"] == "train")
    [speed] = [row[1] for t in page.tables for row in t if row[0] == "images per second, median"]
    assert float(speed) == pytest.approx((speeds[1] + speeds[2]) / 2, rel=1e-3)


def test_the_pictures_are_those_of_the_run(page: Page) -> None:
    """Bit for bit, before and after, at each guidance."""
    found: dict[str, list[np.ndarray]] = {"before": [], "after": []}
    for tag, attributes in page.tags:
        if tag == "img":
            raw = base64.b64decode(attributes["src"].partition(",")[2])
            found[attributes["class"].split()[0]].append(np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")))
    for when, step in (("before", 0), ("after", 4)):
        made = np.concatenate([made_pictures(step, guidance, len(TEXTS)) for guidance in (1.0, 3.0)])
        assert np.array_equal(np.array(found[when]), made)
    assert {a["min"] + a["max"] for tag, a in page.tags if tag == "input" and a["type"] == "range"} == {"0100"}


def test_what_the_run_was_is_said(page: Page, run: Run) -> None:
    said = page.said()
    for expected in ("finished", "4 of 4 steps", "flowbp_sparse", "reward backpropagation", "ab" * 32, "seed 42"):
        assert expected in said
    for expected in ((run.folder / "prompts.sha256").read_text().strip(), "pytest", "torch", "drift.meter=true"):
        assert expected in said
    assert "1 of 4 steps changed nothing" in said and "fell by 14 % (2.90 to 2.50)" in said
    assert f"flowbp-ray export {run.folder}" in said and "resume=auto" not in said
    assert (run.folder / "config.yaml").read_text() in page.texts["code"]
    anchors = {a["href"][1:] for tag, a in page.tags if tag == "a"}
    assert anchors == {a["id"] for tag, a in page.tags if tag == "section"}


def test_a_shell_sees_prompts_as_one_word(page: Page) -> None:
    """The commands to copy name the first prompt, which is not a shell's friend."""
    import shlex

    [commands] = [text for text in page.texts["code"] if text.startswith("flowbp-ray sample")]
    words = shlex.split(commands.splitlines()[0])
    assert words[words.index("-p") + 1] == EVIL


def test_a_run_that_was_killed_says_so_and_how_to_go_on(config: RunConfig) -> None:
    run = made_run(config, done=3)
    status = json.loads((run.folder / "status.json").read_text())
    (run.folder / "status.json").write_text(json.dumps(status | {"written": status["written"] - 3600}))
    page = page_of(run)
    said = page.said()
    assert "killed, or cut off" in said and "3 of 4 steps" in said and "after step 0 and after step 2" in said
    assert f"flowbp-ray train {run.folder / 'config.yaml'} output={run.folder.parent} resume=auto" in said
    tables = [t for t in page.tables if t[0][-1] == "interval of the change"]
    assert [row[2].strip() for row in tables[1][1:]] == ["–"] * (len(tables[1]) - 1)  # guidance 3: before only
    assert {row[4].strip() for row in tables[0][1:]} & {"above zero", "contains zero", "below zero"}


def test_a_run_that_goes_on_says_what_is_missing(config: RunConfig) -> None:
    run = made_run(config, done=1, saved=False)
    said = page_of(run).said()
    assert "--watch" in said and "There is no evaluation after the first step yet" in said
    assert "there are no pictures of a later evaluation yet" in said and "There is no checkpoint yet" in said


def test_a_run_without_a_checkpoint_has_means_from_its_log(config: RunConfig) -> None:
    said = page_of(made_run(config, done=3, saved=False)).said()
    assert "metrics.jsonl, which has no intervals" in said and "have no intervals yet" in said


def test_a_run_that_has_not_begun_has_a_page(config: RunConfig) -> None:
    run = Run.create(config)
    said = page_of(run).said()
    for expected in ("no status.json", "No step has been logged yet", "the first evaluation has not ended"):
        assert expected in said


def test_a_run_that_the_guard_rolled_back_shows_the_step_it_went_back_to(tmp_path: Path) -> None:
    """That is the base here: nothing changed, and the pictures after are those before."""
    rose = {"shapes_clip": (0.5, 0.9)}
    verdict = HackingVerdict(3, "verifier", 0.5, 0.1, 0.2, 1, rose, "rollback", best=0)
    page = page_of(made_run(config_of(tmp_path), done=3, verdict=verdict))
    said = page.said()
    assert f"The guard ended the run: {verdict.describe()}" in said and "finished, ended by the guard" in said
    assert "after step 0 and after step 0" in said and "ended by the guard" in page.texts["li"]
    table = next(t for t in page.tables if t[0][-1] == "interval of the change")
    assert all(numbers(row[3]) == [0.0] * len(numbers(row[3])) for row in table[1:])
    sources = [a["src"] for tag, a in page.tags if tag == "img"]
    assert len(sources) == 4 * len(TEXTS) and len(set(sources)) == 2 * len(TEXTS)


def test_without_evaluations_the_page_says_so(tmp_path: Path) -> None:
    run = made_run(config_of(tmp_path, "evaluation.prompts=null"), evaluated=False)
    said = page_of(run).said()
    assert "Nothing was measured on held-out prompts" in said and "No pictures: evaluation.prompts is null" in said


def test_a_run_that_is_measured_at_its_ends_only_has_a_page(tmp_path: Path) -> None:
    run = made_run(config_of(tmp_path, "evaluation.guidance=[]", "evaluation.guidance_ends=[1.0, 3.0]"))
    assert "guidance 3" in page_of(run).said()


def test_another_number_of_pictures_afterwards_is_no_pair(tmp_path: Path) -> None:
    run = made_run(config_of(tmp_path))
    last = max(run.images.glob("step_*_guidance_1.png"))
    save_grid(read_grid(last, 64, 64)[:3], TEXTS[:3], last)
    page = page_of(run)
    assert len([a for tag, a in page.tags if tag == "input" and "aria-label" in a]) == len(TEXTS)  # of guidance 3 only


def test_torn_and_missing_files_cost_their_part_only(config: RunConfig, run: Run, tmp_path: Path) -> None:
    def copied(name: str) -> Run:
        return Run(Path(shutil.copytree(run.folder, tmp_path / name)))

    torn = copied("torn")
    for file in [
        *torn.images.iterdir(),
        *torn.checkpoints.folder.glob("*/evaluations.npz"),
        torn.folder / "summary.json",
    ]:
        file.write_bytes(file.read_bytes()[:50])
    with (torn.folder / "metrics.jsonl").open("a") as log:
        log.write('{"step": 4, "ki')
    said = page_of(torn).said()
    assert "No pictures: images/ has no readable sheet of step 0" in said and "which has no intervals" in said
    bare = copied("bare")
    for part in ("images", "checkpoints"):
        shutil.rmtree(bare.folder / part)
    for part in ("summary.json", "environment.jsonl", "prompts.sha256", "status.json", "metrics.jsonl"):
        (bare.folder / part).unlink()
    assert "were not recorded" in page_of(bare).said()


def test_prompts_that_have_changed_are_not_shown(config: RunConfig, tmp_path: Path) -> None:
    changed = config_of(tmp_path)
    run = made_run(changed)
    Path(str(changed.evaluation.prompts)).write_text('{"prompt": "another"}\n')
    page = page_of(run)
    assert "held-out prompt 1" in page.texts["figcaption"] and "another" not in page.said()


def test_large_pictures_stay_within_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise is the worst to compress. What does not fit is left out, and the page says how many there are."""
    from flowbp_ray.artifacts import report_measured

    run = made_run(config_of(tmp_path))
    plain = (
        (run.folder / "config.yaml").read_text().replace("height: 64", "height: 400").replace("width: 64", "width: 400")
    )
    monkeypatch.setattr(report_measured, "PICTURES", 700_000)
    noise = np.random.default_rng(0).integers(0, 256, (len(TEXTS), 400, 400, 3), np.uint8)
    for step in (0, 4):
        for guidance in (1, 3):
            save_grid(list(noise), TEXTS, run.images / f"step_{step:06d}_guidance_{guidance}.png")
    (run.folder / "config.yaml").write_text(plain.replace("name: shapes\n", "name: sd35\n"))
    written = write_report(run.folder)
    page = Page(written.path.read_text())
    count = len([a for tag, a in page.tags if tag == "figure" and a["class"] == "pair"])
    assert written.bytes < 900_000 and 0 < count < 2 * len(TEXTS)
    assert "of the 6 pictures in images/" in page.said()


def test_the_command_writes_where_it_is_told(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "page.html"
    assert call("report", str(run.folder), "--out", str(out)) == 0
    assert str(out) in capsys.readouterr().out and out.stat().st_size < LIMIT
    assert [p.name for p in out.parent.iterdir()] == ["page.html"]


def test_what_cannot_be_read_or_written_is_one_line(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(run.folder, tmp_path / "broken")
    (broken / "config.yaml").write_text("steps: [")
    file = tmp_path / "file"
    file.write_text("")
    for words in (["/nowhere"], [str(tmp_path)], [str(broken)], [str(run.folder), "--out", str(file / "x.html")]):
        assert call("report", *words) == 2
        message = capsys.readouterr().err.strip()
        assert message.startswith("flowbp-ray: ") and len(message.splitlines()) == 1
