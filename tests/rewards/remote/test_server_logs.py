"""What a reward server logs and answers of an unexpected error holds no secret."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowbp_ray.rewards.remote.limits import ServerLimits
from flowbp_ray.rewards.remote.server import LOGGING, RequestHandler, _broken, configured
from flowbp_ray.rewards.remote.service import Service
from tests.rewards.remote.servers import TOKEN
from tests.small import small_config

VALUE = "a1b2c3d4e5f6-not-to-be-seen"
NAMES = ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")


@pytest.fixture
def loggers() -> Iterator[None]:
    """uvicorn's settings of loggers hold for the process: put them back."""
    before = [(log, log.handlers[:], log.level, log.propagate, log.disabled) for log in map(logging.getLogger, NAMES)]
    yield
    for log, handlers, level, propagate, disabled in before:
        log.handlers[:], log.propagate, log.disabled = handlers, propagate, disabled
        log.setLevel(level)


@pytest.mark.usefixtures("loggers")
def test_no_secret_is_logged_or_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As uvicorn, set up as the server sets it up, logs what an application raises."""
    monkeypatch.setenv("MY_API_KEY", VALUE)
    config = small_config(tmp_path)
    handler = RequestHandler(Service(config, ServerLimits.of(config)), TOKEN)
    try:
        assert configured(handler).log_config is LOGGING  # which applies it
    finally:
        handler.worker.shutdown()
    try:
        raise TypeError(f"no answer with {VALUE}")
    except TypeError as error:
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
        answer = json.loads(bytes(_broken(error).body))
    said = capsys.readouterr().err
    assert answer == {"error": "TypeError: no answer with ***"}
    assert said.startswith("ERROR: Exception in ASGI application\n") and said.endswith("no answer with ***\n")
    assert VALUE not in said and "Traceback" in said
