"""Exceptions. A mistake of the user is a ValueError (ConfigError); a run that fails later raises RunFailed."""

from __future__ import annotations

import difflib
import errno
import importlib.util
from typing import Any

MOST_SHOWN = 40  # names in a message
LONGEST_PATH = 200  # characters of one in a message
MODULES = {"open-clip-torch": "open_clip"}  # packages whose module has another name


class RunFailed(RuntimeError):
    """The run cannot continue; the message names the cause."""


class Stalled(RunFailed):
    """The run makes no progress although work is left. state: every item and actor, as JSON, for debugging."""

    def __init__(self, message: str, state: dict[str, Any]) -> None:
        super().__init__(message)
        self.state = state


class NoSpace(RunFailed, ValueError):
    """The disk has no room for a checkpoint. Also a ValueError, because another try would fail as this one did."""


class ConfigError(ValueError):
    """A user's input is invalid; the message says what to write instead."""


def need_package(what: str, package: str, extra: str) -> None:
    """Raise ValueError if `package` (of PyPI), which `what` needs, is not installed; `extra` of this package has it."""
    if importlib.util.find_spec(MODULES.get(package, package)) is None:
        raise ValueError(f"{what} needs {package}; install it with pip install 'flowbp-ray[{extra}]'")


OS_ADVICE = {
    errno.EACCES: "change its rights, or write another place",
    errno.EPERM: "change its rights, or write another place",
    errno.EROFS: "write another place",
    errno.EEXIST: "something of that name is in the way; write another",
    errno.ENOTDIR: "a file is where a folder should be; write another place",
    errno.ENAMETOOLONG: "write a shorter one",
    errno.ENOENT: "see whether the path is right",
    errno.EISDIR: "write the name of a file",
    errno.ENOSPC: "make room, or write another place",
    errno.EDQUOT: "make room, or write another place",
    errno.EFBIG: "the file system, or `ulimit -f`, allows no such file; write another place",
    errno.EMFILE: "this shell allows too few open files; raise it with `ulimit -n 65536`",
}


def os_error_line(error: OSError) -> str:
    """What the system refused, in one line: of which file, why, and what to do."""
    if error.strerror is None or error.errno is None:  # a library's own
        return str(error)
    named = error.filename is not None
    advice = OS_ADVICE.get(error.errno, "") if named or error.errno == errno.EMFILE else ""
    path = str(error.filename)
    where = f"{path if len(path) <= LONGEST_PATH else path[:LONGEST_PATH] + '…'}: " if named else ""
    return f"{where}{error.strerror}" + (f"; {advice}" if advice else "")


def nearest(word: str, known: list[str], what: str) -> str:
    """A message about an unknown word: `unknown <what> 'x'; did you mean 'y'?`, or the list of what is known."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    more = f", and {len(known) - MOST_SHOWN} more" if len(known) > MOST_SHOWN else ""
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known)[:MOST_SHOWN])}{more}"
    return f"unknown {what} {word!r}; {hint}"
