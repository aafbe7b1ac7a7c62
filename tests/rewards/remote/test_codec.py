"""Messages as safetensors: read back by safetensors itself, and nothing but `WireError` for any other bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from flowbp_ray.messages import Evaluated, Fault, Packed, Scored, pack, unpack
from flowbp_ray.rewards.remote import codec
from flowbp_ray.rewards.remote.codec import WireError
from flowbp_ray.rewards.remote.wire import EvaluateAnswer, ScoreAnswer, ScoreRequest
from tests.rewards.remote.servers import PROMPTS, item, report, target


@dataclass(frozen=True)
class Later(Scored):
    """What `Scored` may become: an array, one that may be absent, and another shape of tuple."""

    matrix: np.ndarray = None  # type: ignore[assignment]
    more: np.ndarray | None = None
    pair: tuple[int, str] = (1, "b")
    norms: Mapping[str, Packed] | None = None
    note: str | None = None


def scored(**more: Any) -> dict[str, Any]:
    fault = Fault("score", 1, 2, 3, None, "näme")
    plain = {"scores": {"näme": ((0.1, math.nan), (-0.0, 1e-310))}, "losses": (1 / 3, 0.0), "clipped": {"näme": 0.5}}
    plain["gram"] = (((0.1,),), ((1e-310,),))
    return plain | {"step": 1, "index": 2, "cotangent_bytes": 4, "seconds": 0.5, "faults": (fault,)} | more


def body(**changes: Any) -> bytes:
    """A good request."""
    request = ScoreRequest.of(item(), PROMPTS[:2], report(), target(), 4)
    return codec.dump(ScoreRequest(**{**request.__dict__, **changes}))


def rewritten(message: Any = None, header: Any = None, metadata: Any = None) -> bytes:
    """A good request whose message, header or metadata is changed by a function before it is written again."""
    good = body()
    length = int.from_bytes(good[:8], "little")
    head, data = json.loads(good[8 : 8 + length]), good[8 + length :]
    plain = json.loads(head["__metadata__"]["message"])
    plain = plain if message is None else message(plain) or plain
    head["__metadata__"]["message"] = json.dumps(plain)
    if metadata:
        metadata(head["__metadata__"])
    head = head if header is None else header(head) or head
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_safetensors_reads_what_is_written() -> None:
    cotangent = torch.randn(2, 1, 8, 8, 8)
    written = codec.dump(ScoreAnswer(Scored(**scored()), pack(cotangent)))
    assert torch.equal(load(written)["cotangent"], cotangent)
    read = codec.parse(ScoreAnswer, written)
    assert repr(read.scored) == repr(Scored(**scored()))  # repr: NaN is not equal to itself, -0.0 is equal to 0.0
    assert torch.equal(unpack(read.cotangent), cotangent)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8])
def test_every_dtype_keeps_its_bits(dtype: torch.dtype) -> None:
    tensor = (torch.randn(3, 2) * 50).to(dtype)
    written = codec.dump(ScoreAnswer(Scored(**scored()), pack(tensor)))
    assert torch.equal(load(written)["cotangent"], tensor)
    assert torch.equal(unpack(codec.parse(ScoreAnswer, written).cotangent), tensor)


def test_pictures_and_scores_of_an_evaluation() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    written = codec.dump(EvaluateAnswer(Evaluated(1, {"a": (math.nan, math.inf)}, (False, True), images, 0.1)))
    read = codec.parse(EvaluateAnswer, written).evaluated
    assert np.array_equal(load(written)["evaluated.images"].numpy(), images) and np.array_equal(read.images, images)
    assert math.isnan(read.scores["a"][0]) and read.scores["a"][1] == math.inf and read.drawn == (False, True)


def test_fields_that_are_added_to_an_answer_travel_by_name() -> None:
    """Arrays, present or not, also within a mapping; nothing about them is written down in the codec."""
    extra = {"matrix": np.eye(3), "pair": (7, "x"), "norms": {"a": pack(torch.ones(2))}, "note": "n"}
    written = codec.dump(Later(**scored(**extra)))
    assert set(load(written)) == {"matrix", "norms.a"}
    read = codec.parse(Later, written)
    assert np.array_equal(read.matrix, np.eye(3)) and read.more is None and (read.pair, read.note) == ((7, "x"), "n")
    assert read.norms is not None and torch.equal(unpack(read.norms["a"]), torch.ones(2))


@settings(max_examples=60, deadline=None)
@given(st.floats(), st.text(), st.integers(-(2**63) + 1, 2**63 - 1), st.lists(st.floats(width=32), max_size=4))
def test_numbers_and_texts_keep_their_bits(number: float, text: str, integer: int, row: list[float]) -> None:
    """repr of a float is the shortest decimal that reads back as the same double."""
    read = codec.parse(
        Scored, codec.dump(Scored(**scored(step=integer, losses=(number,), scores={text: (tuple(row),)})))
    )
    assert (read.step, repr(read.losses[0]), list(read.scores)) == (integer, repr(number), [text])
    assert repr(read.scores[text][0]) == repr(tuple(row))


MESSAGES = {
    "a missing field": (lambda m: m.pop("seed"), "needs a field seed"),
    "an unknown field": (lambda m: m.update(plans=[]), "no field 'plans'"),
    "a wrong type": (lambda m: m.update(step="3"), "step must be an integer"),
    "true for a number": (lambda m: m.update(step=True), "step must be an integer"),
    "a fraction": (lambda m: m.update(step=1.0), "step must be an integer"),
    "not a number": (lambda m: m.update(step=math.nan), "step must be an integer"),
    "a huge integer": (lambda m: m.update(step=2**63), "64 bits"),
    "an object for a list": (lambda m: m.update(samples={}), "samples must be an array"),
    "a wrong element": (lambda m: m["prompts"].append(None), r"prompts\.2 must be a string"),
    "half a character": (lambda m: m["prompts"].append("\ud800"), "must be Unicode"),
    "a tensor in JSON": (lambda m: m.update(target=[[1.0]]), "target must be null"),
    "an array": (lambda m: [m], "the message must be an object"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_what_is_not_the_message_is_named(case: str) -> None:
    change, reason = MESSAGES[case]
    with pytest.raises(WireError, match=reason):
        codec.parse(ScoreRequest, rewritten(message=lambda m: change(m) if case == "an array" else change(m) and None))


HEADERS = {
    "a negative shape": lambda h: h["target"].update(shape=[-2, 1, 8, 8, 8]),
    "a giant shape": lambda h: h["target"].update(shape=[2**62, 2**62]),
    "offsets beyond the end": lambda h: h["target"].update(data_offsets=[18, 2**60]),
    "a hole": lambda h: h.pop("omega") and None,
    "an overlap": lambda h: h["kept"].update(data_offsets=[0, 2]),
    "an unknown dtype": lambda h: h["target"].update(dtype="F128"),
    "a dtype of another size": lambda h: h["target"].update(dtype="F64"),
    "no object": lambda h: [h],
    "no metadata": lambda h: h.pop("__metadata__") and None,
    "metadata that is no text": lambda h: h["__metadata__"].update(message={}),
    "another version": lambda h: h["__metadata__"].update(flowbp_ray="2"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_is_wrong(case: str) -> None:
    with pytest.raises(WireError):
        codec.parse(ScoreRequest, rewritten(header=HEADERS[case]))


def test_a_tensor_too_many_or_in_a_dtype_that_does_not_travel() -> None:
    good = codec.parse(ScoreRequest, body())
    message = json.loads(codec._metadata(body()))
    metadata = {"flowbp_ray": str(codec.VERSION), "message": json.dumps(message)}
    tensors = {"omega": torch.tensor(good.omega), "kept": torch.tensor(good.kept), "target": unpack(good.target)}
    assert codec.parse(ScoreRequest, save(tensors, metadata)).samples == good.samples  # what safetensors writes is read
    for wrong in ({"more": torch.ones(1)}, {"target": tensors["target"].to(torch.complex64)}):
        with pytest.raises(WireError):
            codec.parse(ScoreRequest, save(tensors | wrong, metadata))


def test_deep_and_huge_numbers_in_json() -> None:
    for text in ("[" * 200_000, '{"a":' * 100_000, "1" * 10_000, '{"step": 1e999}', "\x00", '"\\ud800'):
        head = json.dumps({"__metadata__": {"flowbp_ray": "1", "message": text}}).encode()
        with pytest.raises(WireError):
            codec.parse(ScoreRequest, len(head).to_bytes(8, "little") + head)
        with pytest.raises(WireError):
            codec.parse(ScoreRequest, len(text).to_bytes(8, "little") + text.encode())


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes(random: bytes) -> None:
    with pytest.raises(WireError):
        codec.parse(ScoreRequest, random)
    with pytest.raises(WireError):  # the same behind an honest length
        codec.parse(ScoreRequest, len(random).to_bytes(8, "little") + random)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**20), st.integers(0, 255), st.integers(0, 2**20))
def test_a_good_body_with_a_byte_changed_or_cut_short(where: int, byte: int, end: int) -> None:
    """Either it still is a message, or it is refused."""
    good = bytearray(body())
    head = 8 + int.from_bytes(good[:8], "little")
    good[where % head] = byte
    for candidate in (bytes(good), bytes(good[: end % len(good)])):
        try:
            codec.parse(ScoreRequest, candidate)
        except WireError:
            continue
        assert len(candidate) == len(good)
