"""Checks of judges before anything starts: does the server answer, are the model's folder and vLLM there?"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import aiohttp

from flowbp_ray.judges.client import LARGEST
from flowbp_ray.judges.config import JudgeConfig
from flowbp_ray.judges.server import check_python
from flowbp_ray.utils.addresses import bearer
from flowbp_ray.utils.http import ask
from flowbp_ray.utils.secrets import register

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
    return register(key)


def _check_url(url: str, key: str | None) -> None:
    """Ask for the list of models, which every OpenAI-compatible server has. Raises ValueError without an answer."""
    try:
        status = ask(f"{url}/v1/models", "GET", bearer(key), None, PATIENCE, LARGEST).status
    except (OSError, aiohttp.ClientError) as error:
        reason = " ".join(str(error or type(error).__name__).split())[:200]
        raise ValueError(f"no server answers at {url} ({reason}); start it, or write another url") from error
    if not 200 <= status < 300:
        advice = "; write api_key_env" if status in (401, 403) and key is None else ""
        if 300 <= status < 400:
            advice = " and sends elsewhere; write the url where the server is"
        raise ValueError(f"{url}/v1/models says {status}{advice}")


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
