"""Terms without gradient at a real reward server: the bits of a scorer in this process, and answers of wrong sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowbp_ray import prompts
from flowbp_ray.messages import Packed, Scored
from flowbp_ray.rewards.remote import codec, handshake
from flowbp_ray.rewards.remote.client import RemoteScorer, Unavailable
from flowbp_ray.rewards.remote.wire import ScoreAnswer
from tests.rewards.remote.scripted import Scripted
from tests.rewards.remote.servers import asking, item, report, serving, target
from tests.small import local_digest, scorer_of, small_config

TEXTS = [record.text for record in prompts.load("shapes:train")[:2]]
GROUPS = ["data.images_per_prompt=2", "data.prompts_per_step=2", "rewards.monitors=[]"]
KINDS = {
    "pure": [*GROUPS, "method=null", "rewards.terms=[{name: shapes_verifier, gradient: none}]"],
    "mixed": [*GROUPS, "rewards.terms=[{name: shapes_clip}, {name: shapes_clip_heldout, gradient: none}]"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_gives_the_bits_of_the_scorer_and_the_run_its_digest(kind: str, tmp_path: Path) -> None:
    """A step of a run in this process is the same, whoever scores; and one that wants the gradient does not start."""
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    settings = [*KINDS[kind], "steps=1", "backbone.num_steps=4", f"data.prompts={tmp_path / 'prompts.txt'}"]
    local = small_config(tmp_path, "flowbp_sparse", *settings)
    with serving(tmp_path, *settings) as server:
        config = asking(tmp_path, server.url, *settings)
        remote = RemoteScorer(config, handshake.check(config))
        arguments = (item(), TEXTS, report(), target())
        (mine, my_cotangent), (theirs, cotangent) = (s.score(*arguments) for s in (scorer_of(local), remote))
        assert mine.scores == theirs.scores and mine.clipped == theirs.clipped and mine.gram == theirs.gram
        assert list(theirs.scores) == [term.name for term in config.rewards.terms]
        assert my_cotangent.array.tobytes() == cotangent.array.tobytes()
        assert cotangent.array.shape == ((2, 0) if kind == "pure" else (2, 1, 8, 8, 8))
        assert local_digest(config) == local_digest(local)
        if kind == "mixed":
            other = asking(tmp_path, server.url, *settings, "rewards.terms[1].gradient=pixels")
            with pytest.raises(ValueError, match=r'heldout.gradient is "pixels" here and "none" there'):
                handshake.check(other)


def _without(name: str) -> Callable[[Scored, Packed], tuple[dict[str, Any], Packed]]:
    return lambda s, c: (dict(scores={n: v for n, v in s.scores.items() if n != name}), c)


def _sized(*shape: int) -> Callable[[Scored, Packed], tuple[dict[str, Any], Packed]]:
    sent = Packed(np.zeros(shape, np.float32), "float32")
    return lambda s, c: (dict(cotangent_bytes=sent.nbytes), sent)


WRONG: dict[str, tuple[str, Callable[[Scored, Packed], tuple[dict[str, Any], Packed]], str]] = {
    "a cotangent": ("pure", _sized(2, 1, 8, 8, 8), r"must be float32 \[2, 0\], got float32 \[2, 1, 8, 8, 8\]"),
    "too many rows": ("pure", _sized(3, 0), r"must be float32 \[2, 0\], got float32 \[3, 0\]"),
    "no cotangent": ("mixed", _sized(2, 0), r"must be float32 \[2, 1, 8, 8, 8\], got float32 \[2, 0\]"),
    "no score": ("pure", _without("shapes_verifier"), "scores of nothing for shapes_verifier"),
    "half the scores": (
        "mixed",
        _without("shapes_clip_heldout"),
        "scores of shapes_clip for shapes_clip, shapes_clip_",
    ),
    "a share without gradient": (
        "pure",
        lambda s, c: (dict(clipped={"shapes_verifier": 0.0}), c),
        "clipped of shapes_verifier for nothing",
    ),
    "a gram": ("pure", lambda s, c: (dict(gram=(((1.0,),),) * 2), c), r"gram must be \[2, 0, 0\]"),
    "a larger gram": ("mixed", lambda s, c: (dict(gram=(((1.0,) * 2,) * 2,) * 2), c), r"gram must be \[2, 1, 1\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_answers_of_other_sizes_are_not_taken(case: str, scripted: str, tmp_path: Path) -> None:
    kind, change, reason = WRONG[case]
    good, cotangent = scorer_of(small_config(tmp_path, "flowbp_sparse", *KINDS[kind])).score(
        item(), TEXTS, report(), target()
    )
    remote = RemoteScorer(asking(tmp_path, scripted, *KINDS[kind]), {scripted: "0" * 16})
    Scripted.script = [(200, {}, codec.dump(ScoreAnswer(good, cotangent)))]
    assert remote.score(item(), TEXTS, report(), target())[0].scores == good.scores
    changed, sent = change(good, cotangent)
    Scripted.script = [(200, {}, codec.dump(ScoreAnswer(dataclasses.replace(good, **changed), sent)))]
    with pytest.raises(Unavailable, match=reason):
        remote.score(item(), TEXTS, report(), target())
