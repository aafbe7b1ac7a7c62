"""What Python itself prints of exceptions, warnings and log records holds no secret, whichever library they are of.

An error of a library may hold an address with a token, or a request's headers. Commands and actors call
`hide_in_tracebacks` first: exceptions in any thread and in an object's end, `warnings.warn`, and the handlers of all
loggers, such as those that huggingface_hub, transformers and diffusers bring. What a library prints by itself, or by a
handler that formats in its own way, is not seen.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
import warnings
from contextlib import suppress
from types import TracebackType
from typing import Any

from flowbp_ray.utils.secrets import hidden

REPLACED = {"sys", "ray", "typer"}
"""The packages whose hook for exceptions is replaced: Python's own, and those that print in full. Others', such as
IPython's, stay."""
format_record, handle_error = logging.Handler.format, logging.Handler.handleError
format_warning = warnings.formatwarning


def hide_in_tracebacks() -> None:
    """From now on, whatever prints an exception that nobody catches, a warning or a log record hides.

    A hook that somebody else has set, such as a test runner, stays.
    """
    if (getattr(sys.excepthook, "__module__", None) or "").partition(".")[0] in REPLACED:
        sys.excepthook = print_hidden
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _of_thread
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _unraisable
    if logging.Handler.format is format_record:
        logging.Handler.format = _of_record  # type: ignore[method-assign]
    if logging.Handler.handleError is handle_error:
        logging.Handler.handleError = _of_handler  # type: ignore[method-assign]
    if warnings.formatwarning is format_warning:
        warnings.formatwarning = _of_warning


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


def _of_record(self: logging.Handler, record: logging.LogRecord) -> str:
    return hidden(format_record(self, record))


def _of_handler(self: logging.Handler, record: logging.LogRecord) -> None:
    """What a handler cannot write, such as a record whose arguments do not fit its message."""
    if not logging.raiseExceptions:
        return
    try:
        what = f"{record.msg!r}\nArguments: {record.args!r}"
    except Exception:  # of an argument's own __repr__
        what = "what cannot be shown"
    _print(f"--- Logging error ---\n{traceback.format_exc()}At {record.pathname}:{record.lineno}\nMessage: {what}\n")


def _of_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return hidden(format_warning(message, category, filename, lineno, line))


def _print(text: str) -> None:
    if sys.stderr is not None:  # as in a process without one
        with suppress(OSError, ValueError):  # a pipe without a reader, a closed stream
            print(hidden(text), end="", file=sys.stderr, flush=True)
