"""Checks before a run starts: do its reward servers answer, take its token, and have the run's settings?"""

from __future__ import annotations

import json
import ssl
from typing import Any

import aiohttp

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.rewards.remote import codec, token
from flowbp_ray.rewards.remote.identity import different, identity
from flowbp_ray.rewards.remote.limits import ServerLimits
from flowbp_ray.rewards.remote.wire import HEALTH_TIME, LARGEST_LINE, line, reason
from flowbp_ray.utils.addresses import bearer
from flowbp_ray.utils.http import ask


def check(config: RunConfig) -> dict[str, str]:
    """Ask every address of `rewards.url` for its health; address -> the digest of what it scores, for every request.

    Empty where there is no address. Raises ValueError in one line for the first that does not answer, shuts down,
    refuses the token, has other settings, or takes smaller requests than the run sends.
    """
    if not config.rewards.url:
        return {}
    urls, agreed = list(dict.fromkeys(config.rewards.url)), dict[str, str]()
    secret = token.read(config.rewards.token_file, "rewards.token_file")
    needed, wanted = ServerLimits.of(config), identity(config)
    first: dict[str, Any] | None = None
    for url in urls:
        about = _health(url, secret)
        if lines := different(wanted, about["identity"]):
            more = f" and {len(lines) - 2} more" if len(lines) > 2 else ""
            raise ValueError(f"rewards.url: {url} has other settings: {'; '.join(lines[:2])}{more}")
        first = first or about["identity"]
        if lines := different(first, about["identity"]):
            raise ValueError(f"rewards.url: {urls[0]} (here) and {url} (there) score differently: {lines[0]}")
        if about["max_rows"] < needed.rows or about["max_bytes"] < needed.nbytes:
            raise ValueError(
                f"rewards.url: {url} takes {about['max_rows']} rows and {about['max_bytes']} bytes at once, an item of "
                f"this run has up to {needed.rows} and {needed.nbytes}; start it with a larger --max-rows"
            )
        agreed[url] = about["digest"]
    return agreed


def _health(url: str, secret: str) -> dict[str, Any]:
    """The answer of /health with the token. Raises ValueError where it is not that of a ready server."""
    try:
        answer = ask(f"{url}/health", "GET", bearer(secret), None, HEALTH_TIME, LARGEST_LINE)
    except ssl.SSLCertVerificationError as error:
        raise ValueError(
            f"rewards.url: the certificate of {url} is not trusted here ({error.verify_message}); set SSL_CERT_FILE to "
            "a file with its authority's, here and where the reward actors run"
        ) from error
    except (OSError, aiohttp.ClientError) as error:
        raise ValueError(
            f"rewards.url: {url} does not answer ({line(error)}); start `flowbp-ray serve-reward` there, or write its "
            "address"
        ) from error
    status, content = answer.status, answer.content
    if status == 401:
        raise ValueError(f"rewards.url: {url} refuses the token; write rewards.token_file: what its --token-file holds")
    try:
        about: Any = json.loads(content)
        state, version = about["status"], about["version"]
        ready = status == 200 and state == "ready"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        said = f"{status}: {reason(content)}"
        raise ValueError(f"rewards.url: {url} is no `flowbp-ray serve-reward`; its /health answers {said}") from error
    if version != codec.VERSION:
        raise ValueError(
            f"rewards.url: {url} speaks version {version} of the wire format, this side {codec.VERSION}; "
            "run the same flowbp_ray on both"
        )
    if not ready:
        raise ValueError(f"rewards.url: {url} is {state}; wait until it has started again, or write another address")
    if not all(key in about for key in ("identity", "digest", "max_rows", "max_bytes")):
        raise ValueError(f"rewards.url: {url} does not say what it scores; does a proxy drop the Authorization header?")
    return dict(about)
