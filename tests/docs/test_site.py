"""The site: every page has its place, links lead somewhere, and what is generated is complete."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.site import figures, layout, reference
from flowbp_ray.backbones.registry import BACKBONES
from flowbp_ray.config import loading
from flowbp_ray.observability import catalog
from flowbp_ray.rewards import REWARDS
from flowbp_ray.surrogate import METHODS
from tests.docs.pages import FENCE, PAGES
from tests.paths import ROOT

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return reference.pages()


def nav() -> list[Any]:
    class Loader(yaml.SafeLoader):
        """Reads mkdocs.yml, whose one tag is a function."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
    found = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    assert found["strict"] is True and found["theme"]["font"] is False
    return layout.with_decisions(found["nav"])


def test_every_page_has_one_place_in_the_nav(pages: dict[str, str]) -> None:
    named = layout.nav_pages(nav())
    committed = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert len(named) == len(set(named))
    assert set(named) == committed | set(pages) | set(layout.root_pages())


@pytest.mark.parametrize("page", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_links_to_files_of_the_repository_lead_there(page: Path) -> None:
    """In the repository as well as on the site, whose build checks anchors too."""
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path = target.partition("#")[0]
        if path and "://" not in path:
            assert (page.parent / path).exists(), target


def test_the_reference_is_complete(pages: dict[str, str]) -> None:
    assert heads(pages["reference/cli.md"]) == list(reference.commands())
    assert heads(pages["reference/methods.md"]) == list(METHODS)
    assert heads(pages["reference/rewards.md"]) == list(REWARDS)
    assert heads(pages["reference/backbones.md"]) == list(BACKBONES)
    rows = re.findall(r"^\| `([^`]+)` \|", pages["reference/metrics.md"], flags=re.MULTILINE)
    assert sorted(rows) == sorted(metric.key for metric in catalog.TABLE)
    rows = re.findall(r"^\| `([^`]+)` \|", pages["reference/configs.md"], flags=re.MULTILINE)
    assert rows == sorted(path.stem for path in (loading.shipped() / "runs").glob("*.yaml"))


def heads(page: str) -> list[str]:
    return re.findall(r"^## (.*)$", page, flags=re.MULTILINE)


def test_every_option_says_what_it_is(pages: dict[str, str]) -> None:
    rows = re.findall(r"^\| (`.*`) \| .* \| (.*) \|$", pages["reference/cli.md"], flags=re.MULTILINE)
    assert len(rows) > 60 and not [name for name, what in rows if not what.strip()]
    options = {option for command in reference.commands().values() for p in command.params for option in p.opts}
    missing = {
        option for option in options if option.startswith("--") and f"`{option}`" not in pages["reference/cli.md"]
    }
    assert not missing


def test_the_committed_figures_are_those_that_the_plans_give() -> None:
    again = "draw them anew: python -m benchmarks.site.figures"
    drawn = figures.figures()
    assert {path.name for path in (DOCS / "figures").glob("*.svg")} == set(drawn), again
    assert not [name for name, picture in drawn.items() if (DOCS / "figures" / name).read_text() != picture], again


@pytest.mark.parametrize("name", METHODS)
def test_a_figure_shows_the_coefficients_of_its_plan(name: str) -> None:
    """Told from the picture's text alone: one number per product, and as many filled circles as active states."""
    plan = figures.drawn(name)
    picture = figures.figure(name, plan)
    red = "\n".join(line for line in picture.splitlines() if "#b3261e" in line)
    numbers = re.findall(r">(?:reward, )?(\d[\d.e-]*)</text>", red)
    expected = [f"{abs(term.c_last) + abs(term.c_first):.2g}" for term in plan.terms()]
    assert sorted(numbers) == sorted(expected)
    filled = re.findall(r"r='8' fill='#(?:3f51b5|00897b)'", picture)
    assert len(filled) == len(plan.states)


def test_links_that_leave_the_documents() -> None:
    assert layout.relinked("[a](../SECURITY.md#x)", "") == "[a](security.md#x)"
    assert layout.relinked("[a](../../README.md)", "howto") == "[a](../index.md)"
    assert layout.relinked("[k.json](../tests/k.json)", "") == "`tests/k.json`"
    assert layout.relinked("[the list](../tests/k.json)", "") == "the list (`tests/k.json`)"
    inside = "[b](../any-reward.md#judges) [c](https://d.e) [d](#here)"
    assert layout.relinked(inside, "howto") == inside


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    """No warning: no broken link or anchor, no page without a place; and nothing is loaded from elsewhere."""
    pytest.importorskip("material", reason="the extra docs is not installed: make docs builds the site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    written = list((tmp_path / "site").rglob("*.html"))
    assert len(written) > 40
    for file in written:
        assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"https?:", file.read_text())
