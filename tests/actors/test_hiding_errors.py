"""What an actor raises, and Ray writes down or keeps in the object store, holds no secret."""

from __future__ import annotations

import importlib
import inspect
import pickle
import pkgutil
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
from ray.actor import ActorClass

import actors
from actors.errors import NotCached
from actors.process import hiding_errors
from actors.reward import RewardActor
from flowbp_ray.rewards.remote.client import Unavailable

VALUE = "a1b2c3d4e5f6-not-to-be-seen"


@hiding_errors
class Fails:
    def __init__(self, error: Exception | None = None, cause: Exception | None = None) -> None:
        if error:
            raise error from cause

    def method(self, error: Exception) -> None:
        raise error

    def parts(self, error: Exception) -> Iterator[int]:
        yield 1
        raise error


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


def test_methods_hide_and_keep_what_the_driver_asks_for() -> None:
    """Errors of our own by which the driver decides what to do keep their class."""
    for error in (NotCached(f"of {VALUE}"), Unavailable(f"at {VALUE}"), ValueError(f"of {VALUE}")):
        for call in (Fails().method, lambda error: list(Fails().parts(error))):
            with pytest.raises(type(error)) as caught:
                call(error)
            assert type(caught.value) is type(error)
            assert VALUE not in "".join(traceback.format_exception(caught.value))
    assert next(Fails().parts(TypeError())) == 1


def test_an_attribute_with_a_secret_is_found() -> None:
    """As in the errors of HTTP libraries, which hold the request with its headers."""
    error = OSError("403")
    error.headers = {"Authorization": f"Bearer {VALUE}"}  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="OSError: 403") as caught:
        Fails().method(error)
    assert VALUE.encode() not in pickle.dumps(caught.value)


def test_the_log_says_where_it_was_raised(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RuntimeError):
        Fails().method(TypeError(f"with {VALUE}"))
    assert "in method" in caplog.text and "with ***" in caplog.text and VALUE not in caplog.text


def test_other_errors_are_raised_as_they_are() -> None:
    error = TypeError("without")
    for call in (Fails, Fails().method, lambda error: list(Fails().parts(error))):
        with pytest.raises(TypeError) as caught:
            call(error)
        assert caught.value is error


@pytest.mark.ray
def test_what_a_method_raises_in_an_actor(local_ray: Any) -> None:
    """The error as Ray hands it over: its message has the remote traceback."""
    actor = local_ray.remote(Fails).options(runtime_env={"env_vars": {"MY_API_KEY": VALUE}}).remote()
    with pytest.raises(NotCached) as caught:
        local_ray.get(actor.method.remote(NotCached(f"of {VALUE}")))
    assert "of ***" in str(caught.value) and VALUE not in repr(caught.value) + str(caught.value)


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


def test_every_method_of_every_actor_hides() -> None:
    """All that Ray can call. A constructor may be Python's own, as a learner's, which is built by a method."""
    found = actor_classes()
    assert {"actors.encoder.EncoderActor", "actors.encoder.ReaderActor", "actors.judge.JudgeActor",
            "actors.learner.LearnerActor", "actors.reward.RewardActor", "actors.sampler.SamplerActor",
            "actors.shared.SharedActor"} <= set(found)  # fmt: skip
    hiding = {Fails.method.__code__, Fails.parts.__code__}
    for name, made in found.items():
        for method, function in inspect.getmembers(made, inspect.isfunction):
            if method == "__init__" or not method.startswith("_"):
                assert function.__code__ in hiding, f"{name}.{method} lacks hiding_errors"


def test_ray_sees_the_constructors_arguments() -> None:
    assert list(inspect.signature(RewardActor.__init__).parameters)[:3] == ["self", "config", "agreed"]
