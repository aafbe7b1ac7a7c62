"""The frame of every command: quiet libraries, and errors as one line with an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from flowbp_ray.utils import accelerator
from flowbp_ray.utils.errors import RunFailed
from flowbp_ray.utils.signals import Interrupted


def guarded(command: Callable[[], object]) -> None:
    """Run a command and print errors as lines.

    Exit codes: 2 for ValueError and OSError, 1 for RunFailed, 130 after an interrupt.
    """
    quieten()
    try:
        command()
    except KeyboardInterrupt:
        print("flowbp-ray: stopped at once", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, Interrupted, RunFailed) as error:
        print(f"flowbp-ray: {error}", file=sys.stderr)
        sys.exit(130 if isinstance(error, Interrupted) else 1 if isinstance(error, RunFailed) else 2)


def quieten() -> None:
    """Make the libraries log errors only, so that the output is the command's own."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not accelerator.available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # without this DeepSpeed warns each time it detects that
