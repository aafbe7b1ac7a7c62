"""The pages that errors name: each is there with its anchor, and real errors name the one that explains them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from flowbp_ray.config import loading
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.prompts import read_prompts
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.errors import NoSpace, RunFailed, Stalled
from flowbp_ray.utils.pages import BY_CLASS, BY_WORDS, SECTIONS, page_of, with_page
from tests.config.test_reference import models_within
from tests.paths import ROOT


def anchors(page: Path) -> set[str]:
    """Those of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


NAMED = sorted({page for _, page in (*BY_CLASS, *BY_WORDS)} | {f"configuration.md#{name}" for name in SECTIONS})


@pytest.mark.parametrize("named", NAMED)
def test_every_page_and_anchor_is_there(named: str) -> None:
    page, _, anchor = named.partition("#")
    assert (ROOT / "docs" / page).is_file()
    assert not anchor or anchor in anchors(ROOT / "docs" / page)


def test_sections_are_those_of_a_configuration() -> None:
    own = {name for name, field in RunConfig.model_fields.items() if models_within(field.annotation)}
    assert set(SECTIONS) == own | {"method"} and issubclass(RunConfig, BaseModel)


REFUSED = {
    "data.rollout_batch=5": "configuration.md#data",
    "learners.optimizer.lr=fast": "configuration.md#learners",
    "data.heldout={fraction: 2}": "prompts.md#holding-a-share-out",
    "evaluation.prompts=data:heldout": "prompts.md#holding-a-share-out",
    "data.prompts=/nowhere/judge/geneval.txt": "prompts.md",
    "data.columns={prompt: caption}": "prompts.md#columns-splits-and-selection",
    "data.weights=often": "prompts.md#how-often-each-is-drawn",
    "backbone.quantization=nf4": "one-card.md#a-quantised-base",
    "cluster.share_base=true": "one-card.md#a-shared-base",
    "cluster.scaling=rule": "cluster.md#more-or-fewer-while-it-runs",
    "staleness=2": "architecture.md#what-is-watched",
    "method.name=ref": "choosing-a-method.md",
    "rewards.terms=[{name: shapes_clip, clip: high}]": "rewards.md#available-rewards",
    "guard.metric=1": "rewards.md#when-a-reward-is-hacked",
}


@pytest.mark.parametrize("override", sorted(REFUSED))
def test_real_errors_name_their_page(tmp_path: Path, override: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_prompts(loading.load("shapes_refl", [override, f"output={tmp_path}"]))
    assert page_of(caught.value) == f"docs/{REFUSED[override]}"
    assert with_page(caught.value) == f"{caught.value} (see {page_of(caught.value)})"


def test_by_class_and_none(tmp_path: Path) -> None:
    assert page_of(Stalled("nothing moves", {})) == "docs/observing.md#from-its-folder"
    assert page_of(NoSpace("no room for /judge/x")) == "docs/architecture.md#a-checkpoint"
    with pytest.raises(ValueError) as caught:
        Run.open(tmp_path)
    assert page_of(caught.value) == "docs/architecture.md#a-runs-folder"
    assert with_page(RunFailed("the learners died")) == "the learners died"
    assert with_page(ValueError("data.weights is bad; docs/x.md says why")) == "data.weights is bad; docs/x.md says why"
