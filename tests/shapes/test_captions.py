"""Sentences of the grammar are read back into the claims that they state, and others are refused."""

from __future__ import annotations

import numpy as np
import pytest

from flowbp_ray.shapes.captions import captions, claim_of
from flowbp_ray.shapes.prompts import load_prompts
from flowbp_ray.shapes.sampling import sample_claim
from flowbp_ray.shapes.world import SKILLS, Claim, Part


def test_every_sentence_says_its_claim() -> None:
    rng = np.random.default_rng(0)
    for index in range(300):
        claim = sample_claim(rng, SKILLS[index % 6])
        for text in captions(claim):
            read = claim_of(text)
            assert read == claim or (claim.relation is None and read == Claim(claim.parts[::-1]))


def test_the_committed_prompts_are_read() -> None:
    for prompt in load_prompts("heldout"):
        parts = {claim_of(prompt.text).parts, claim_of(prompt.text).parts[::-1]}
        assert prompt.claim.parts in parts and claim_of(prompt.text).relation == prompt.claim.relation


def test_case_and_punctuation_do_not_matter() -> None:
    assert claim_of("A photo of an orange ring, to the LEFT of a star!") == Claim(
        (Part("ring", colour="orange"), Part("star")), "left of"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a dog", "'dog'|does not end with one of circle"),
        ("star", "does not begin with an article or a number"),
        ("two star", "does not end with one of circles"),
        ("a red red star", "does not end with one of circle"),
        ("a star and two rings", "does not begin with an article"),
        ("", "does not begin with an article"),
    ],
)
def test_what_is_no_sentence_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        claim_of(text)
    assert str(error.value).startswith(f"{text!r} is no sentence of the shapes grammar")
