"""What a configuration names outside itself: addresses of servers, and files that actors open from elsewhere."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


def parse_urls(value: Any) -> Any:
    """One address or a list of them, as a list without trailing slashes. Raises ValueError for what is none."""
    values = [value] if isinstance(value, str) else value
    return [parse_url(v) for v in values] if isinstance(values, list) else values


def parse_url(value: Any) -> Any:
    """An address such as https://host:8000/prefix. Raises ValueError for another scheme, and for secrets within it."""
    if not isinstance(value, str):
        return value
    parts = urlsplit(value)
    try:
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, or too large
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


def absolute(value: str | None) -> str | None:
    """A path as seen from where the command runs. Raises ValueError for the home of a user who is not here."""
    try:
        return None if value is None else str(Path(value).expanduser().absolute())
    except RuntimeError as error:
        raise ValueError(f"{value!r} names the home of nobody here; write the whole path") from error


def existing_path(path: str | Path) -> Path | None:
    """The file or folder that this names, or None: a text may be too long for a name, or of a user who is not here."""
    try:
        found = Path(path).expanduser()
        return found if found.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None


def bearer(secret: str | None) -> dict[str, str]:
    """The header that shows a token or an API key; none without one."""
    return {"Authorization": f"Bearer {secret}"} if secret else {}
