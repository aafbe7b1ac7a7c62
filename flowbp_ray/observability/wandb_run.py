"""A run at Weights & Biases, which must never keep a training run from starting.

Whether it is online is wandb's own choice where the user made one (WANDB_MODE, WANDB_DISABLED); else it is online where
a key is known (WANDB_API_KEY, ~/.netrc) and the server answers.
"""

from __future__ import annotations

import netrc
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flowbp_ray.observability.destinations import Shown

SERVER = "https://api.wandb.ai"
PATIENCE = 5.0  # seconds within which the server must answer
MODES = ("online", "offline", "disabled", "shared")
TRUE = ("1", "true", "yes", "on")


class WandbRun:
    """Numbers and pictures for a run of wandb's, which sends them from a process of its own."""

    name = "wandb"

    def __init__(self, run: Any) -> None:
        """run: of `start`."""
        self.run = run

    @classmethod
    def open(
        cls, folder: Path, project: str, run_id: str, config: Mapping[str, Any], say: Callable[[str], object]
    ) -> list[WandbRun]:
        """One that `start` has started; none where the user has disabled it."""
        run = start(folder, project, run_id, config, say)
        return [] if run is None else [cls(run)]

    def log(self, step: int, kind: str, numbers: Mapping[str, float]) -> None:
        late = kind == "judge"  # wandb drops a step that is not the newest
        self.run.log({**numbers, "judge/step": step} if late else dict(numbers), step=None if late else step)

    def show(self, step: int, shown: Shown) -> None:
        import wandb

        both = zip(shown.pictures, shown.prompts, strict=True)
        self.run.log({shown.name: [wandb.Image(picture, caption=prompt) for picture, prompt in both]}, step=step)

    def rewind(self, step: int) -> None:
        """Nothing: the run has the same id, and wandb keeps the first values of a step."""

    def close(self) -> None:
        self.run.finish()


def start(folder: Path, project: str, run_id: str, config: Mapping[str, Any], say: Callable[[str], object]) -> Any:
    """Start wandb's run in `folder` and return it, or None where the user has disabled it.

    say: takes a line where the run is offline although a key is known. Raises ValueError for an unknown WANDB_MODE.
    """
    mode: Any
    mode, why = chosen_mode()
    if why:
        say(f"wandb: {why}; this run is logged offline, `wandb sync {folder}/wandb/offline-run-*` sends it later")
    if mode == "disabled":
        return None
    import wandb

    arguments: dict[str, Any] = {
        "project": project,
        "name": folder.name,
        "id": run_id,
        "resume": "allow",
        "dir": str(folder),
        "config": dict(config),
        "settings": wandb.Settings(silent=True, console="off", init_timeout=30),
    }
    try:
        return wandb.init(**arguments, mode=mode)
    except (wandb.errors.Error, OSError, TimeoutError) as error:
        if mode == "offline":
            raise ValueError(f"tracking.wandb: {_line(error)}; write tracking.wandb=false") from error
        say(f"wandb: {_line(error)}; this run is logged offline")
        return wandb.init(**arguments, mode="offline")


def chosen_mode() -> tuple[str, str]:
    """wandb's mode, and why it is offline where that is not what the user would expect ("" where it is)."""
    mode = os.environ.get("WANDB_MODE", "").strip().lower()
    if mode == "dryrun":
        mode = "offline"
    if mode and mode not in MODES:
        raise ValueError(f"WANDB_MODE is {mode!r}; set one of {', '.join(MODES)}")
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in TRUE:
        return "disabled", ""
    server = os.environ.get("WANDB_BASE_URL") or SERVER
    if mode and mode != "online":
        return mode, ""
    if not mode and not has_key(server):
        return "offline", ""
    problem = unreachable(server)
    return ("offline", problem) if problem else ("online", "")


def has_key(server: str) -> bool:
    """Whether a key for the server is in the environment or in the file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY", "").strip():
        return True
    file = os.environ.get("NETRC") or "~/.netrc"
    with suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError, RuntimeError):
        found = netrc.netrc(str(Path(file).expanduser())).authenticators(urlsplit(server).hostname or "")
        return bool(found and found[2])
    return False


def unreachable(server: str) -> str:
    """Why no server answers, "" where one does: any answer by HTTP will do. Proxies of the environment are used."""
    try:
        urllib.request.urlopen(server, timeout=PATIENCE).close()
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        return f"{server} does not answer ({' '.join(str(reason).split())})"
    return ""


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
