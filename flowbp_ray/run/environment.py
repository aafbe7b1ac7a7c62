"""environment.jsonl: by which command, with which versions and on which machine a run was started, a line each time."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from flowbp_ray import __version__
from flowbp_ray.utils.secrets import hidden

FILE = "environment.jsonl"
PACKAGES = (
    "torch",
    "ray",
    "deepspeed",
    "diffusers",
    "transformers",
    "peft",
    "tokenizers",
    "bitsandbytes",
    "safetensors",
    "numpy",
)
SECONDS = 4  # that each of three calls of git may take


def record(folder: Path) -> None:
    """Add a line for this process to the folder's file. A disk that refuses is ignored: it must not end a run."""
    line = hidden(json.dumps(of_this_process())).encode() + b"\n"
    with suppress(OSError), (folder / FILE).open("ab+") as file:
        if file.tell():  # a kill may have torn the last line
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)


def read(folder: Path) -> list[dict[str, Any]]:
    """The starts of a run, oldest first; none where nothing was recorded. Lines that a kill tore are left out."""
    found: list[dict[str, Any]] = []
    with suppress(OSError, UnicodeDecodeError):
        for text in (folder / FILE).read_text().splitlines():
            with suppress(ValueError):
                line = json.loads(text)
                found += [line] if isinstance(line, dict) else []
    return found


def of_this_process() -> dict[str, Any]:
    """When, the command, versions, machine, and the commit of the package's checkout (None where there is none)."""
    return {
        "began": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command(),
        "folder": os.getcwd(),
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": versions(),
        "git": commit_of(Path(__file__).resolve()),
    }


def versions() -> dict[str, str]:
    """Versions by package, of those that are installed; also `python`."""
    found = {"flowbp_ray": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def command() -> str:
    """How this process was started; of a program other than flowbp-ray the name only, its arguments may be secrets."""
    name = Path(sys.argv[0]).name if sys.argv else "python"
    if name == "__main__.py":  # python -m flowbp_ray train …
        return shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])
    return shlex.join([name, *sys.argv[1:]]) if name == "flowbp-ray" else name


def commit_of(file: Path) -> str | None:
    """The commit of the git checkout that `file` is in, with "+changes" where tracked files differ from it.

    None without git, outside a checkout, and where git does not track the file (an environment inside a checkout).
    """
    try:
        _git(file, "ls-files", "--error-unmatch", file.name)
        changed = _git(file, "status", "--porcelain", "--untracked-files=no")
        return _git(file, "rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(file: Path, *words: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(file.parent), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS).stdout.strip()
