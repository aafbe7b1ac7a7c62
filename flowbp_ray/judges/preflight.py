"""What can be known of a judge before anything starts: whether its server answers, its folder and vLLM are there."""

from __future__ import annotations

import http.client
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowbp_ray.judges.config import JudgeConfig
from flowbp_ray.judges.server import check_python
from flowbp_ray.utils.addresses import bearer

PATIENCE = 10.0  # seconds for a running server to answer


def check(judges: Sequence[JudgeConfig]) -> None:
    """Raises ValueError for what the user must change."""
    for judge in judges:
        try:
            key = api_key(judge)
            _check_url(judge.url, key) if judge.url else _check_model(judge)
        except ValueError as error:
            raise ValueError(f"judge {judge.name!r}: {error}") from error


def api_key(judge: JudgeConfig) -> str | None:
    """The key in the environment variable that the configuration names."""
    if judge.api_key_env is None:
        return None
    name, key = judge.api_key_env, os.environ.get(judge.api_key_env, "").strip()
    if not key:
        raise ValueError(f"api_key_env names {name}, which is not set here; set it, or name another one")
    if not (key.isascii() and key.isprintable()):  # which an HTTP library would refuse, and print
        raise ValueError(f"api_key_env names {name}, which has characters that no key has; set it to the key alone")
    return key


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Whoever is asked must answer: the key would go along."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _check_url(url: str, key: str | None) -> None:
    """The list of models must come: that is there at every OpenAI-compatible server."""
    asked = urllib.request.Request(f"{url}/v1/models", headers=bearer(key))
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), NoRedirect)  # as the client does it
    try:
        with direct.open(asked, timeout=PATIENCE) as response:
            response.read(1)
    except urllib.error.HTTPError as error:
        advice = "; write api_key_env" if error.code in (401, 403) and key is None else ""
        if 300 <= error.code < 400:
            advice = " and sends elsewhere; write the url where the server is"
        raise ValueError(f"{url}/v1/models says {error.code}{advice}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = " ".join(str(getattr(error, "reason", None) or error or type(error).__name__).split())[:200]
        raise ValueError(f"no server answers at {url} ({reason}); start it, or write another url") from error


def _check_model(judge: JudgeConfig) -> None:
    assert judge.model is not None
    if not sys.platform.startswith("linux"):
        raise ValueError("a server of our own needs Linux; start one yourself and write its url")
    if not (Path(judge.model) / "config.json").is_file():
        raise ValueError(
            f"model is {judge.model!r}, which has no config.json; write the folder of a vision-language model in the "
            "layout of transformers, such as a download of CodeGoat24/UnifiedReward-2.0-qwen-7b"
        )
    check_python(judge.server)
