"""Answers that a real `Scorer` did not give: each part is changed in turn, sent by a real socket, and not taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.messages import Evaluated, Fault, Packed, Scored, pack, unpack
from flowbp_ray.rewards.remote import codec
from flowbp_ray.rewards.remote.client import RemoteScorer, Unavailable
from flowbp_ray.rewards.remote.wire import EvaluateAnswer, ScoreAnswer
from flowbp_ray.rewards.scorer import Scorer
from tests.rewards.remote.scripted import Scripted
from tests.rewards.remote.servers import BOTH, PROMPTS, asking, bits, item, report, target
from tests.small import scorer_of, small_config

TERMS = "rewards.terms=[{name: shapes_clip}, {name: shapes_clip_heldout}]"
BALANCED = [TERMS, "rewards.monitors=[]", "rewards.balance=grad_norm"]
Change = Callable[[Any], dict[str, Any]]


def client(folder: Path, url: str, *overrides: str) -> RemoteScorer:
    return RemoteScorer(asking(folder, url, *overrides), {url: "0" * 16})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return scorer_of(small_config(tmp_path_factory.mktemp("run"), "flowbp_sparse", BOTH))


def scored(config: RunConfig) -> tuple[Scored, Packed]:
    return scorer_of(config).score(item(), PROMPTS[:2], report(), target())


FAULT = Fault("score", 3, 1, 1, None, "shapes_clip")
SCORES: dict[str, tuple[Change, str]] = {
    "another step": (lambda s: dict(step=2), "step 2, item 1 for step 3, item 1"),
    "another item": (lambda s: dict(index=0), "step 3, item 0 for step 3, item 1"),
    "another reward": (lambda s: dict(scores={"x\n": s.scores["shapes_clip"]}), r"scores of x\\n for shapes_clip"),
    "no reward": (lambda s: dict(scores={}), "scores of nothing for shapes_clip"),
    "clipped of another": (lambda s: dict(clipped={}), "clipped of nothing for shapes_clip"),
    "a row less": (lambda s: dict(scores={n: v[:1] for n, v in s.scores.items()}), r"shapes_clip must be \[2, 1\]"),
    "a branch more": (lambda s: dict(scores={n: ((0.0, 0.0),) * 2 for n in s.scores}), r"must be \[2, 1\]"),
    "a loss more": (lambda s: dict(losses=(*s.losses, 0.0)), r"losses must be \[2\], got \[3\]"),
    "a gram less": (lambda s: dict(gram=s.gram[:1]), r"gram must be \[2, 1, 1\]"),
    "a larger gram": (lambda s: dict(gram=(((0.0, 0.0), (0.0, 0.0)),) * 2), r"gram must be \[2, 1, 1\]"),
    "bytes": (lambda s: dict(cotangent_bytes=1), "cotangent_bytes must be 4096, got 1"),
    "a time": (lambda s: dict(seconds=float("nan")), "seconds must be a time, got nan"),
    "a fault of a prompt that is none": (
        lambda s: dict(faults=(dataclasses.replace(FAULT, prompt=10**9),)),
        "a fault that names nothing of the item",
    ),
    "a fault of another sample": (lambda s: dict(faults=(dataclasses.replace(FAULT, sample=0),)), "a fault that"),
    "a fault of a sampler": (lambda s: dict(faults=(dataclasses.replace(FAULT, what="velocity"),)), "a fault that"),
}


@pytest.mark.parametrize("case", SCORES)
def test_scores_that_do_not_fit_are_not_taken(plain: Scorer, scripted: str, tmp_path: Path, case: str) -> None:
    change, reason = SCORES[case]
    good, cotangent = plain.score(item(), PROMPTS[:2], report(), target())
    Scripted.script = [(200, {}, codec.dump(ScoreAnswer(dataclasses.replace(good, **change(good)), cotangent)))]
    with pytest.raises(Unavailable, match=reason) as found:
        client(tmp_path, scripted, BOTH).score(item(), PROMPTS[:2], report(), target())
    assert "\n" not in str(found.value) and f"{scripted}/score answered with" in str(found.value)
    assert Scripted.asked == 1


COTANGENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "in fp64": torch.Tensor.double,
    "in bf16": torch.Tensor.bfloat16,
    "a row less": lambda u: u[:1],
    "an axis more": lambda u: u[None],
    "an axis less": lambda u: u[:, 0],
    "another order": lambda u: u.transpose(0, 1),
}


@pytest.mark.parametrize("case", COTANGENTS)
def test_a_cotangent_that_does_not_fit_is_not_taken(plain: Scorer, scripted: str, tmp_path: Path, case: str) -> None:
    good, cotangent = plain.score(item(), PROMPTS[:2], report(), target())
    changed = pack(COTANGENTS[case](unpack(cotangent)))
    fitting = dataclasses.replace(good, cotangent_bytes=changed.nbytes)
    Scripted.script = [(200, {}, codec.dump(ScoreAnswer(fitting, changed)))]
    with pytest.raises(Unavailable, match=r"the cotangent must be float32 \[2, 1, 8, 8, 8\], got"):
        client(tmp_path, scripted, BOTH).score(item(), PROMPTS[:2], report(), target())


def test_balanced_terms_have_a_cotangent_each(scripted: str, tmp_path: Path) -> None:
    """What fits is taken bit for bit, also with a fault of its own; a sum in the place of the terms' is not."""
    config = small_config(tmp_path, "flowbp_sparse", *BALANCED)
    good, cotangent = scored(config)
    good = dataclasses.replace(good, faults=(FAULT,))
    Scripted.script = [(200, {}, codec.dump(ScoreAnswer(good, cotangent)))]
    remote = client(tmp_path, scripted, *BALANCED)
    found, pulled = remote.score(item(), PROMPTS[:2], report(), target())
    assert pulled.array.shape == (2, 2, 1, 8, 8, 8) and bits(unpack(pulled)) == bits(unpack(cotangent))
    assert found.faults == (FAULT,)
    summed = pack(unpack(cotangent).sum(0))
    short = dataclasses.replace(good, cotangent_bytes=summed.nbytes)
    Scripted.script = [(200, {}, codec.dump(ScoreAnswer(short, summed)))]
    with pytest.raises(Unavailable, match=r"must be float32 \[2, 2, 1, 8, 8, 8\], got float32 \[2, 1, 8, 8, 8\]"):
        remote.score(item(), PROMPTS[:2], report(), target())


EVALUATIONS: dict[str, tuple[Change, str]] = {
    "another item": (lambda e: dict(index=0), "item 0 for item 1"),
    "only the term": (lambda e: dict(scores={"shapes_clip": e.scores["shapes_clip"]}), "scores of shapes_clip for"),
    "a score more": (lambda e: dict(scores={n: (*v, 0.0) for n, v in e.scores.items()}), r"must be \[2\], got \[3\]"),
    "a row less": (lambda e: dict(drawn=(True,)), r"drawn must be \[2\], got \[1\]"),
    "a picture less": (lambda e: dict(images=e.images[:1]), r"images must be uint8 \[2, 64, 64, 3\], got uint8 \[1, "),
    "floats": (lambda e: dict(images=e.images.astype(np.float32)), "got float32"),
    "small pictures": (lambda e: dict(images=e.images[:, ::2, ::2].copy()), r"got uint8 \[2, 32, 32, 3\]"),
    "grey pictures": (lambda e: dict(images=e.images[..., :1].copy()), r"got uint8 \[2, 64, 64, 1\]"),
    "a time": (lambda e: dict(seconds=-1.0), "seconds must be a time"),
}


@pytest.mark.parametrize("case", EVALUATIONS)
def test_evaluations_that_do_not_fit_are_not_taken(plain: Scorer, scripted: str, tmp_path: Path, case: str) -> None:
    change, reason = EVALUATIONS[case]
    good: Evaluated = plain.evaluate(item(), PROMPTS[:2], target(2, None))
    remote = client(tmp_path, scripted, BOTH)
    Scripted.script = [(200, {}, codec.dump(EvaluateAnswer(good)))]
    assert remote.evaluate(item(), PROMPTS[:2], target(2, None)).scores == good.scores
    Scripted.script = [(200, {}, codec.dump(EvaluateAnswer(dataclasses.replace(good, **change(good)))))]
    with pytest.raises(Unavailable, match=f"/evaluate answered with .*{reason}"):
        remote.evaluate(item(), PROMPTS[:2], target(2, None))
