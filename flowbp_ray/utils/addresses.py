"""Parsing of addresses and paths in a configuration."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator


def parse_urls(value: Any) -> Any:
    """Return one address or a list of them as a list without trailing slashes. Raises ValueError for a bad address."""
    values = [value] if isinstance(value, str) else value
    return [parse_url(v) for v in values] if isinstance(values, list) else values


def parse_url(value: Any) -> Any:
    """Check an address such as https://host:8000/prefix. Raises ValueError for another scheme, or secrets within it."""
    if not isinstance(value, str):
        return value
    try:
        parts = urlsplit(value)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is not a number, or too large; brackets that do not close
        known = False
    if not known:
        raise ValueError(f"{value!r} is no address; write for example https://host:8000")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError("an address is written down with the run: write scheme, host, port and path only")
    return value.rstrip("/")


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of `host` that nothing is bound to at the moment. host "": every address of this machine."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def expand(value: str) -> str:
    """Replace a ~ at the start of a path by the home that it names. Raises ValueError where there is no such home."""
    if not value.startswith("~"):
        return value
    try:
        return str(Path(value).expanduser())
    except RuntimeError as error:
        raise ValueError(f"{value!r} names the home of nobody here; write the whole path, or set HOME") from error


UserPath = Annotated[str, AfterValidator(expand)]
"""A path in a configuration, in which a ~ at the start stands for the user's home."""


def absolute(value: str | None) -> str | None:
    """Expand ~ and make a path absolute from the working directory. Raises ValueError for an unknown user's ~."""
    return None if value is None else str(Path(expand(value)).absolute())


def existing_path(path: str | Path) -> Path | None:
    """Return the path if it exists, else None; also for a text that is no valid path or names an unknown user."""
    try:
        found = Path(path).expanduser()
        return found if found.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None


def bearer(secret: str | None) -> dict[str, str]:
    """Return the HTTP header for a token or an API key; empty without one."""
    return {"Authorization": f"Bearer {secret}"} if secret else {}
