"""What every command does around its work: quiet libraries, and errors as lines with an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from flowbp_ray.utils.errors import RunFailed
from flowbp_ray.utils.signals import Interrupted

if TYPE_CHECKING:
    pass


def guarded(command: Callable[[], object]) -> None:
    """Run a command: what a user must change becomes lines and exit code 2, a failed run exit code 1."""
    quieten()
    try:
        command()
    except ValueError as error:
        print(f"flowbp-ray: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("flowbp-ray: stopped at once", file=sys.stderr)
        sys.exit(130)
    except Interrupted as error:
        print(f"flowbp-ray: {error}", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        print(f"flowbp-ray: {error}", file=sys.stderr)
        sys.exit(2)
    except RunFailed as error:
        print(f"flowbp-ray: {error}", file=sys.stderr)
        sys.exit(1)


def quieten() -> None:
    """Let the libraries below us speak of errors only, so that what is printed is ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns whenever it has to find that out
