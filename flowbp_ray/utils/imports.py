"""What libraries log when they are imported for something that we do not use.

diffusers' models import peft, and peft imports bitsandbytes, whether or not a base is quantised. On a CPU with AVX-512
BF16 bitsandbytes then looks for a kernel of the package `kernels`, which only its products of 4-bit weights on the CPU
would use; ours are dequantised (`backbones.quantised`). That it is not installed is no fault, and nobody can act on it.
"""

from __future__ import annotations

import logging

LOGGER = "bitsandbytes.backends.cpu.ops"
PACKAGE = "kernels"


class _Installed(logging.Filter):
    """Passes all records but those that say that PACKAGE is not installed."""

    def filter(self, record: logging.LogRecord) -> bool:
        reasons = record.args if isinstance(record.args, tuple) else ()
        return not any(isinstance(r, ModuleNotFoundError) and r.name == PACKAGE for r in reasons)


def without_kernels() -> None:
    """Drop that one message, in this process; everything else that the logger says still comes."""
    logger = logging.getLogger(LOGGER)
    if not any(isinstance(known, _Installed) for known in logger.filters):
        logger.addFilter(_Installed())
