"""What Python itself prints of exceptions holds no secret: in any thread, in an object's end, in libraries' warnings.

An error of a library may hold an address with a token, or a request's headers. Commands and actors call
`hide_in_tracebacks` first.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from contextlib import suppress
from types import TracebackType
from typing import Any

from flowbp_ray.utils.secrets import HidingFormatter, hidden


def hide_in_tracebacks() -> None:
    """From now on, whatever prints an exception that nobody catches, or a log record that nobody handles, hides.

    A hook that somebody else has set for threads or for objects, such as a test runner, stays.
    """
    sys.excepthook = print_hidden
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _of_thread
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _unraisable
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(HidingFormatter("%(message)s"))


def print_hidden(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback on stderr as Python does, with `***` in the place of each secret."""
    _print("".join(traceback.format_exception(kind, error, trace)))


def _of_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is SystemExit:
        return
    name = args.thread.name if args.thread is not None else threading.get_ident()
    lines = traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback)
    _print(f"Exception in thread {name}:\n{''.join(lines)}")


def _unraisable(args: Any) -> None:
    lines = traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback)
    _print(f"{args.err_msg or 'Exception ignored in'}: {args.object!r}\n{''.join(lines)}")


def _print(text: str) -> None:
    if sys.stderr is not None:  # as in a process without one
        with suppress(OSError, ValueError):  # a pipe without a reader, a closed stream
            print(hidden(text), end="", file=sys.stderr, flush=True)
