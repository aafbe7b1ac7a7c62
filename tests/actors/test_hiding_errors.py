"""What an actor's constructor raises, and Ray writes down, holds no secret."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import traceback

import pytest
from ray.actor import ActorClass

import actors
from actors.process import hiding_errors
from actors.reward import RewardActor

VALUE = "a1b2c3d4e5f6-not-to-be-seen"


class Fails:
    @hiding_errors
    def __init__(self, error: Exception, cause: Exception | None = None) -> None:
        raise error from cause


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", VALUE)


def test_an_error_with_a_secret_becomes_one_without() -> None:
    cases = (
        (TypeError(f"with {VALUE}"), None, RuntimeError, "TypeError: with ***"),
        (FileNotFoundError(f"with {VALUE}"), None, RuntimeError, "FileNotFoundError: with ***"),
        (UnicodeError(f"with {VALUE}"), None, ValueError, "UnicodeError: with ***"),
        (ValueError("outside"), KeyError(f"inside {VALUE}"), ValueError, "ValueError: outside"),
    )
    for error, cause, kind, message in cases:
        with pytest.raises(kind) as caught:
            Fails(error, cause)
        assert type(caught.value) is kind and str(caught.value) == message
        assert VALUE not in "".join(traceback.format_exception(caught.value))


def test_other_errors_are_raised_as_they_are() -> None:
    error = TypeError("without")
    with pytest.raises(TypeError) as caught:
        Fails(error)
    assert caught.value is error


def actor_classes() -> dict[str, type]:
    """Every class of actors/ that is given to ray.remote, by the names of its module and its own.

    Not the emulated ones: they are given times and sizes alone, and import neither torch nor what the others are set
    up with.
    """
    found = {}
    for module in pkgutil.iter_modules(actors.__path__, "actors."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, ActorClass) and module.name != "actors.emulated":
                made = vars(value)["__ray_metadata__"].modified_class.__mro__[1]
                found[f"{made.__module__}.{made.__name__}"] = made
    return found


def test_the_constructor_of_every_actor_hides() -> None:
    """Or it is Python's own, as a learner's, which is built by a method."""
    found = actor_classes()
    assert {"actors.encoder.EncoderActor", "actors.encoder.ReaderActor", "actors.judge.JudgeActor",
            "actors.learner.LearnerActor", "actors.reward.RewardActor", "actors.sampler.SamplerActor",
            "actors.shared.SharedActor"} <= set(found)  # fmt: skip
    for name, made in found.items():
        constructor = made.__init__  # type: ignore[misc]
        hides = getattr(constructor, "__code__", None) is Fails.__init__.__code__
        assert hides or constructor is object.__init__, f"{name}.__init__ lacks @hiding_errors"


def test_ray_sees_the_constructors_arguments() -> None:
    assert list(inspect.signature(RewardActor.__init__).parameters)[:3] == ["self", "config", "agreed"]
