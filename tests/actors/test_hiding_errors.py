"""What an actor's constructor raises, and Ray writes down, holds no secret."""

from __future__ import annotations

import inspect
import traceback

import pytest

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


def test_ray_sees_the_constructors_arguments() -> None:
    assert list(inspect.signature(RewardActor.__init__).parameters)[:3] == ["self", "config", "agreed"]
