"""The secret that a run and its reward servers share: in a file or in the environment, never on a command line."""

from __future__ import annotations

import hmac
import os
from pathlib import Path

from flowbp_ray.utils.addresses import expand
from flowbp_ray.utils.secrets import register
from flowbp_ray.utils.text_files import read_text

VARIABLE = "FLOWBP_RAY_REWARD_TOKEN"
SHORTEST = 16


def read(file: str | Path | None, option: str) -> str:
    """The token in `file`, or in $FLOWBP_RAY_REWARD_TOKEN where there is no file.

    option: what names the file, for the message. Raises ValueError where there is no token, or one that can be guessed.
    """
    if file is None:
        found, where = os.environ.get(VARIABLE, ""), f"${VARIABLE}"
        if not found.strip():
            raise ValueError(f"no token for the reward servers; write {option}: a file that holds it, or set {where}")
    else:
        try:
            found, where = read_text(Path(expand(str(file))), str(file)), str(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"{option}: {str(file)!r} cannot be read; write a file that holds the token") from error
    found = found.strip()
    if len(found) < SHORTEST or not all("!" <= c <= "~" for c in found):
        raise ValueError(
            f"the token in {where} must be {SHORTEST} or more printable ASCII characters without spaces; make one with "
            "`openssl rand -hex 32`"
        )
    return register(found)


def allowed(header: str | None, token: str) -> bool:
    """Whether an Authorization header is `Bearer <token>` (RFC 6750, section 2.1); the time taken tells nothing."""
    scheme, _, given = (header or "").partition(" ")
    same = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), token.encode())
    return scheme.lower() == "bearer" and same
