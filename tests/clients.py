"""What nodes and clients of a cluster with token authentication need."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

BIN = Path(sys.executable).parent


def new_token(file: Path) -> Path:
    file.write_text(secrets.token_hex(32))
    file.chmod(0o600)
    return file


def environment(token: Path) -> dict[str, str]:
    """PATH with this interpreter first, and the token that every node and client needs."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return own | {
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }


def accepted(submit: Callable[[], subprocess.CompletedProcess[str]]) -> subprocess.CompletedProcess[str]:
    """`ray job submit`, again until the node's agent is there: the dashboard answers before it is."""
    for _ in range(30):
        done = submit()
        if "No available agent to submit job" not in done.stderr:
            break
        time.sleep(1)
    return done
