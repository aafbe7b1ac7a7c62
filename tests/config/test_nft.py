"""Which terms and methods go together: each refusal, and what the command line and `extends` make of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowbp_ray.config import loading
from flowbp_ray.surrogate.active import Inactive
from flowbp_ray.utils.errors import ConfigError

VERIFIED = ["rewards.terms=[{name: shapes_verifier, gradient: none}]", "data.images_per_prompt=4"]
PURE = ["method=null", *VERIFIED]
MIXED = ["rewards.terms=[{name: shapes_clip}, {name: shapes_verifier, gradient: none}]", "data.images_per_prompt=4"]
JUDGED = ["method=null", "rewards.terms=[{name: look, kind: judge, gradient: none}]", "data.images_per_prompt=4"]
JUDGE = "judges=[{name: look, url: 'http://127.0.0.1:9', template: {kind: yes_no}, role: reward}]"

REFUSED = {
    "a differentiable term without a method": (
        ["method=null"],
        r"rewards.terms has 'shapes_clip', which needs a method .*; write method.name=flowbp_sparse, or gradient: none",
    ),
    "a method without a differentiable term": (VERIFIED, r"no term has a gradient for the method .*write method=null"),
    "an average that is not there": (
        [*PURE, "nft.policy=average"],
        r"nft.policy=average needs an average; write learners.ema.decay=0.5 and learners.ema.ramp=0.001",
    ),
    "a target that is not the sample": (
        [*MIXED, "method.name=refl"],
        r"'shapes_verifier' \(gradient: none\) scores finished images, but method's target is late_posterior; write",
    ),
    "one image of a prompt": (
        [*PURE, "data.images_per_prompt=1"],
        r"'shapes_verifier' \(gradient: none\) compares the images .* at least 2; write data.images_per_prompt=8",
    ),
    "more times than steps": ([*PURE, "nft.times=99"], r"nft.times=99 is more than backbone.num_steps=\d+ has"),
    "a drift meter": (
        [*PURE, "drift.meter=true"],
        r"drift measures at the nodes .*method is null; write drift.meter=false and drift.max=null",
    ),
    "a drift limit": ([*PURE, "drift.max=0.1"], r"method is null; write drift.meter=false and drift.max=null"),
    "a weight that is not above 0": (
        ["method=null", "rewards.terms=[{name: shapes_verifier, gradient: none, weight: 0}]"],
        r"rewards.terms.0: 'shapes_verifier': weight=0 must be above 0 with gradient: none",
    ),
    "a clip": (
        ["method=null", "rewards.terms=[{name: shapes_verifier, gradient: none, clip: 0.5}]"],
        r"'shapes_verifier': clip is not used with gradient: none; leave it out",
    ),
    "a scale": (
        ["method=null", "rewards.terms=[{name: shapes_verifier, gradient: none, scale: 3}]"],
        r"'shapes_verifier': scale is not used with gradient: none; leave it out",
    ),
    "a judge's gradient": (
        ["rewards.terms=[{name: look, kind: judge}]"],
        r"'look': a judge's scores have no gradient; write gradient: none",
    ),
    "another gradient": (["rewards.terms=[{name: shapes_clip, gradient: some}]"], r"'pixels' or 'none', got 'some'"),
    "a term of no judge": (JUDGED, r"rewards.terms names 'look' with kind: judge, but .* none: write role: reward"),
    "a judge of no term": (
        [JUDGE],
        r"judge 'look' has role=reward and no term; write in rewards.terms \{name: look.*, kind: judge, gradient: none",
    ),
    "a judge and remote reward servers": (
        [*JUDGED, JUDGE, "rewards.url=http://127.0.0.1:8", "rewards.token_file=token"],
        r"look at pictures, which remote reward servers keep; write\s+rewards.url=null",
    ),
    "a guard on what is trained on": (
        [*PURE, "evaluation.every=1", "guard.metrics={shapes_verifier: 0.1}"],
        r"guard.metrics names 'shapes_verifier', which is trained on",
    ),
    "no strength": ([*PURE, "nft.beta=0"], r"nft.beta: Input should be greater than 0, got 0"),
    "no time": ([*PURE, "nft.times=0"], r"nft.times: Input should be greater than or equal to 1, got 0"),
    "no width": ([*PURE, "nft.clip=0"], r"nft.clip: Input should be greater than 0, got 0"),
    "another std": ([*PURE, "nft.std=image"], r"nft.std: Input should be 'batch' or 'prompt', got 'image'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(case: str) -> None:
    overrides, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as found:
        loading.load("shapes_flowbp_sparse", overrides)
    assert "\n" not in str(found.value)


def test_a_guard_does_not_take_the_metric_of_a_judge_that_is_trained_on() -> None:
    guarded = ["evaluation.every=1", "guard.metrics={look: 0.1}"]
    with pytest.raises(ConfigError, match=r"guard.metrics names 'look', which is trained on"):
        loading.load("shapes_flowbp_sparse", [*JUDGED, JUDGE, *guarded])


def test_no_method_on_the_command_line_and_over_one_that_is_extended(tmp_path: Path) -> None:
    config = loading.load("shapes_flowbp_sparse", PURE)
    assert config.method is None and isinstance(config.surrogate().active, Inactive)
    base = loading.shipped() / "runs" / "shapes_flowbp_sparse.yaml"
    (tmp_path / "pure.yaml").write_text(
        f"extends: {base}\nmethod: null\ndata: {{images_per_prompt: 4}}\n"
        "rewards: {terms: [{name: shapes_verifier, gradient: none}]}\n"
    )
    assert loading.load(tmp_path / "pure.yaml") == config
    (tmp_path / "again.yaml").write_text(
        "extends: pure.yaml\nmethod: {name: flowbp_bridge, k: 4}\nrewards: {terms: [{name: shapes_clip}]}\n"
    )
    assert loading.load(tmp_path / "again.yaml").method == {"name": "flowbp_bridge", "k": 4}


@pytest.mark.parametrize("overrides", [PURE, MIXED])
def test_a_resolved_config_reads_back_the_same(tmp_path: Path, overrides: list[str]) -> None:
    """A run's folder has one, from which it is resumed and exported."""
    config = loading.load("shapes_flowbp_sparse", overrides)
    (tmp_path / "config.yaml").write_text(loading.dump(config))
    assert loading.load(tmp_path / "config.yaml") == config


def test_none_on_the_command_line_is_the_gradient() -> None:
    for key in ("rewards.terms[1].gradient=none", "rewards.terms.1.gradient=None", "rewards.terms[1].gradient=null"):
        config = loading.load(
            "shapes_flowbp_sparse",
            ["rewards.terms=[{name: shapes_clip}, {name: shapes_verifier}]", key, "data.images_per_prompt=4"],
        )
        assert [term.gradient for term in config.rewards.terms] == ["pixels", "none"], key
        assert [term.name for term in config.rewards.scored] == ["shapes_verifier"]


def test_an_average_that_follows_at_a_rate_of_its_own() -> None:
    config = loading.load("shapes_flowbp_sparse", [*PURE, "nft.policy=average", "learners.ema={decay: 0.5}"])
    assert config.learners.ema is not None and config.learners.ema.ramp is None
    ramped = loading.load(
        "shapes_flowbp_sparse", [*PURE, "nft.policy=average", "learners.ema={decay: 0.5, ramp: 0.001}"]
    )
    assert ramped.learners.ema is not None and ramped.learners.ema.ramp == 0.001
    with pytest.raises(ConfigError, match=r"learners.ema.ramp: Input should be greater than 0, got 0"):
        loading.load("shapes_flowbp_sparse", ["learners.ema={decay: 0.5, ramp: 0}"])


def test_the_exact_verifier_is_trained_on_where_a_term_is_it() -> None:
    assert loading.load("shapes_demo").trained_on == ["shapes_preference", "shapes_verifier", "verifier"]
    assert loading.load("shapes_flowbp_sparse").trained_on == ["shapes_clip"]
