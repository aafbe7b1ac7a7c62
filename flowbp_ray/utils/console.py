"""The frame of every command: quiet libraries, and errors as one line with an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from flowbp_ray.utils import accelerator
from flowbp_ray.utils.errors import RunFailed
from flowbp_ray.utils.pages import with_page
from flowbp_ray.utils.secrets import hidden
from flowbp_ray.utils.signals import Interrupted
from flowbp_ray.utils.tracebacks import hide_in_tracebacks, print_hidden


def guarded(command: Callable[[], object]) -> None:
    """Run a command and print errors as lines, and others as tracebacks; neither holds a secret.

    Exit codes: 2 for ValueError and OSError, 1 for RunFailed and what is unexpected, 130 after an interrupt.
    """
    quieten()
    hide_in_tracebacks()
    try:
        command()
    except KeyboardInterrupt:
        print("flowbp-ray: stopped at once", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, Interrupted, RunFailed) as error:
        print(f"flowbp-ray: {hidden(with_page(error))}", file=sys.stderr)
        sys.exit(130 if isinstance(error, Interrupted) else 1 if isinstance(error, RunFailed) else 2)
    except Exception as error:  # not left to sys.excepthook: Ray and typer put their own there
        print_hidden(type(error), error, error.__traceback__)
        sys.exit(1)


def quieten() -> None:
    """Make the libraries log errors only, so that the output is the command's own."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not accelerator.available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # without this DeepSpeed warns each time it detects that


class Lasting:
    """A text stream whose reader may go away: from then on what is printed is lost, and nothing ends because of it."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write, or lose, the text; return its length."""
        with self._silenced():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._silenced():
            self.stream.flush()

    @contextmanager
    def _silenced(self) -> Iterator[None]:
        """Where the stream cannot be written to, point its file descriptor at /dev/null."""
        try:
            yield
        except (OSError, ValueError):  # a pipe without a reader, a closed terminal, a full disk; a closed stream
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.stream.fileno())
                os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def lasting_output(message: str) -> Iterator[None]:
    """The frame of a command that takes long: a closed stdout or stderr only silences the printing.

    message: printed after Ctrl-C, which ends the process with 130 (click would answer it without a word).
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)
    try:
        yield
    except KeyboardInterrupt:
        print(f"flowbp-ray: {message}", file=sys.stderr)
        sys.exit(130)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
