"""What a reward server logs and answers of an unexpected error holds no secret."""

from __future__ import annotations

import json
import logging
import logging.config

import pytest

from flowbp_ray.rewards.remote.server import LOGGING, _broken

VALUE = "a1b2c3d4e5f6-not-to-be-seen"


def test_no_secret_is_logged_or_answered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As uvicorn logs what an application raises, by the settings that it is given."""
    monkeypatch.setenv("MY_API_KEY", VALUE)
    logging.config.dictConfig(LOGGING)
    try:
        raise TypeError(f"no answer with {VALUE}")
    except TypeError as error:
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
        answer = json.loads(bytes(_broken(error).body))
    said = capsys.readouterr().err
    assert answer == {"error": "TypeError: no answer with ***"}
    assert said.startswith("ERROR: Exception in ASGI application\n") and said.endswith("no answer with ***\n")
    assert VALUE not in said and "Traceback" in said
