"""What a reward server makes of a body, in this process: the bits of a `Scorer`, or a reason in the 400s."""

from __future__ import annotations

import dataclasses
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.messages import unpack
from flowbp_ray.rewards.remote import codec
from flowbp_ray.rewards.remote.client import RemoteScorer, Unavailable, assigned
from flowbp_ray.rewards.remote.limits import ServerLimits
from flowbp_ray.rewards.remote.service import RequestRefused, Service
from flowbp_ray.rewards.remote.wire import EvaluateAnswer, EvaluateRequest, ScoreAnswer, ScoreRequest
from tests.rewards.remote.scripted import Scripted
from tests.rewards.remote.servers import BOTH, PROMPTS, asking, bits, item, report, target
from tests.small import small_config


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    config = small_config(tmp_path_factory.mktemp("run"), "flowbp_sparse", BOTH)
    return Service(config, ServerLimits.of(config, rows=4))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Service:
    """Of a method with three targets per sample."""
    config = small_config(tmp_path_factory.mktemp("run"), "draft_lv", BOTH)
    return Service(config, ServerLimits.of(config, rows=4))


def request(rows: int = 2, **changes: Any) -> bytes:
    made = ScoreRequest.of(
        item(tuple(range(rows))), PROMPTS[:rows], report((1.0,) * rows, (True,) * rows), target(rows), 4
    )
    return codec.dump(dataclasses.replace(made, **changes))


@pytest.mark.parametrize(("branches", "dtype"), [(1, torch.float32), (3, torch.float32), (1, torch.bfloat16)])
def test_a_score_has_the_bits_of_the_scorer(
    service: Service, several: Service, branches: int, dtype: torch.dtype
) -> None:
    """Jitter is on: seed, step and samples arrive. A row that is not kept, and one that is not finite, too."""
    service = several if branches == 3 else service
    latents = target(3, branches, dtype)
    unpack(latents)[2] = torch.nan
    arguments = (item((3, 0, 2)), PROMPTS[:3], report((0.7, 1 / 3, 1.0), (True, False, True)), latents)
    scored, cotangent = service.scorer.score(*arguments)
    answer = codec.parse(ScoreAnswer, service.score(codec.dump(ScoreRequest.of(*arguments, batch=4))))
    assert bits(unpack(answer.cotangent)) == bits(unpack(cotangent)) and answer.cotangent.dtype == "float32"
    assert unpack(cotangent)[0].abs().max() > 0 and scored.faults and not unpack(cotangent)[1].any()
    assert repr(dataclasses.replace(answer.scored, seconds=0)) == repr(dataclasses.replace(scored, seconds=0))


def test_an_evaluation_has_the_bits_of_the_scorer(service: Service) -> None:
    latents = target(3, None)
    unpack(latents)[1, 0] = torch.inf
    arguments = (item((0, 1, 2)), PROMPTS[:3], latents)
    expected = service.scorer.evaluate(*arguments)
    found = codec.parse(EvaluateAnswer, service.evaluate(codec.dump(EvaluateRequest.of(*arguments)))).evaluated
    assert set(found.scores) == {"shapes_clip", "shapes_clip_heldout"}
    assert {name: bits(row) for name, row in found.scores.items()} == {n: bits(r) for n, r in expected.scores.items()}
    assert found.drawn == expected.drawn == (True, False, True) and found.index == expected.index
    assert found.images.dtype == np.uint8 and np.array_equal(found.images, expected.images)


WRONG = {
    "no rows": (dict(rows=0), "1 to 4 rows, got 0"),
    "too many rows": (dict(samples=(0,) * 5), "1 to 4 rows, got 5"),
    "prompts": (dict(prompts=("a red circle",)), "2 samples need 2 prompts, got 1"),
    "prompt ids": (dict(prompt_ids=(1, 2, 3)), "2 samples need 2 prompt_ids"),
    "negative seed": (dict(seed=-1), "must not be negative"),
    "negative sample": (dict(samples=(0, -3)), "must not be negative"),
    "omega of another size": (dict(omega=np.ones(3)), r"omega must be \[2\] finite float64"),
    "omega in fp32": (dict(omega=np.ones(2, np.float32)), "omega must be"),
    "omega that is no number": (dict(omega=np.array([1.0, np.nan])), "omega must be"),
    "kept as numbers": (dict(kept=np.ones(2, np.uint8)), r"kept must be \[2\] bool"),
    "no branches": (dict(target=target(2, 0)), "target must be"),
    "more branches": (dict(target=target(2, 2)), r"target must be \[2, 1, 8, 8, 8\], got \[2, 2, 8, 8, 8\]"),
    "no axis of branches": (dict(target=target(2, None)), r"\[2, 1, 8, 8, 8\], got \[2, 8, 8, 8\]"),
    "other rows": (dict(target=target(3)), r"target must be \[2, "),
    "fp64": (dict(target=target(2, 1, torch.float64)), "one of float32, bfloat16, float16, got float64"),
    "integers": (dict(target=target(2, 1, torch.int32)), "got int32"),
    "another batch": (dict(batch=8), "the global batch is 8 there and 4 here"),
    "a prompt that the reward cannot read": (dict(prompts=("a red circle", "a dog")), r"do not know \['dog'\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_item_of_this_run_is_refused(service: Service, case: str) -> None:
    changes, reason = WRONG[case]
    body = request(0, omega=np.ones(0)) if case == "no rows" else request(**changes)
    with pytest.raises(RequestRefused, match=reason) as error:
        service.score(body)
    assert error.value.status == 422


def test_an_evaluation_that_does_not_fit(service: Service) -> None:
    for latents, prompts in (
        (target(2, 1), PROMPTS[:2]),
        (target(2, None), PROMPTS[:3]),
        (target(1, None), PROMPTS[:2]),
    ):
        with pytest.raises(RequestRefused, match=r"must be|need") as error:
            service.evaluate(codec.dump(EvaluateRequest.of(item(), prompts, latents)))
        assert error.value.status == 422
    with pytest.raises(RequestRefused) as error:
        service.evaluate(request())
    assert error.value.status == 400


def ask(config: RunConfig) -> tuple[Any, Any]:
    assert config.rewards.url
    return RemoteScorer(config, {config.rewards.url[0]: "0123456789abcdef"}).score(
        item(), PROMPTS[:2], report(), target()
    )


def test_what_may_succeed_later_is_tried_again(service: Service, scripted: str, tmp_path: Path) -> None:
    """A proxy without an upstream, a queue that is full, a connection that breaks, an answer cut short."""
    good = service.score(codec.dump(ScoreRequest.of(item(), PROMPTS[:2], report(), target(), 4)))
    Scripted.script = [(502, {}, b"<html>"), (503, {"Retry-After": "0"}, b'{"error": "full"}'), None, (200, {}, good)]
    scored, cotangent = ask(asking(tmp_path, scripted))
    assert Scripted.asked == 4
    assert bits(unpack(cotangent)) == bits(unpack(service.scorer.score(item(), PROMPTS[:2], report(), target())[1]))
    assert (scored.step, scored.index) == (3, 1)


@pytest.mark.parametrize("status", [400, 401, 413, 422])
def test_a_request_that_is_refused_is_not_sent_again(scripted: str, tmp_path: Path, status: int) -> None:
    """A ValueError: the run says so and stops."""
    Scripted.script = [(status, {}, b'{"error": "this is why"}')]
    with pytest.raises(ValueError, match=f"/score answered {status}: this is why"):
        ask(asking(tmp_path, scripted))
    assert Scripted.asked == 1


@pytest.mark.parametrize(
    "answer", [(500, {}, b'{"error": "out of memory"}'), (200, {}, b"not safetensors"), (408, {}, b"")]
)
def test_a_server_that_fails_leaves_the_item_to_be_issued_again(scripted: str, tmp_path: Path, answer: Any) -> None:
    Scripted.script = [answer]
    with pytest.raises(Unavailable):
        ask(asking(tmp_path, scripted))
    assert Scripted.asked == 1


def test_an_answer_for_another_item_is_not_taken(service: Service, scripted: str, tmp_path: Path) -> None:
    other = service.score(codec.dump(ScoreRequest.of(item(step=2), PROMPTS[:2], report(), target(), 4)))
    Scripted.script = [(200, {}, other)]
    with pytest.raises(Unavailable, match="/score answered with step 2, item 1 for step 3, item 1"):
        ask(asking(tmp_path, scripted))


def test_an_answer_larger_than_any_is_not_kept(scripted: str, tmp_path: Path) -> None:
    Scripted.script = [(200, {}, b"0" * (2 << 20))]
    with pytest.raises(Unavailable, match="did not answer well: an answer of 2097152 bytes, more than 10"):
        ask(asking(tmp_path, scripted))
    assert Scripted.asked == 1


def test_silence_ends_before_the_run_would(tmp_path: Path) -> None:
    """Nine tenths of the stall timeout, after all of which the driver calls it a stall."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = asking(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}", "cluster.stall_timeout=1")
        began = time.monotonic()
        with pytest.raises(Unavailable, match="did not answer well: no whole answer within 1 s"):
            ask(config)
        assert 0.85 < time.monotonic() - began < 1.0


def test_patience_ends(scripted: str, tmp_path: Path) -> None:
    """Half of the stall timeout, so that the run does not stall before it is told."""
    Scripted.script = [(503, {}, b'{"error": "full"}')]
    with pytest.raises(Unavailable, match=r"answered 503: full \(for \d s\)"):
        ask(asking(tmp_path, scripted, "cluster.stall_timeout=1"))
    assert Scripted.asked > 2


def test_each_reward_process_has_its_address(tmp_path: Path) -> None:
    config = asking(tmp_path, ["http://a:1", "https://b/prefix/"], "rewards.count=3")
    assert [assigned(config, i).rewards.url for i in range(3)] == [["http://a:1"], ["https://b/prefix"], ["http://a:1"]]
    assert assigned(small_config(tmp_path), 1).rewards.url is None
