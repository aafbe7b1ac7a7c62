"""Numbers of bytes and of seconds for people."""

from __future__ import annotations

GIB = 2**30

UNITS = {"TiB": 2**40, "GiB": GIB, "MiB": 2**20, "KiB": 2**10}


def format_bytes(nbytes: float, unit: str | None = None) -> str:
    """`nbytes` with a unit, such as "3.62 MiB": about three digits, in the largest unit that gives 1 or more.

    unit: one of `UNITS`, in which the number is then written with one decimal, so that several can be compared.
    """
    if unit is not None:
        return f"{nbytes / UNITS[unit]:.1f} {unit}"
    for name, one in UNITS.items():
        if nbytes >= one:
            value = nbytes / one
            return f"{value:.2f} {name}" if value < 10 else f"{value:.1f} {name}"
    return f"{nbytes:.0f} B"


def format_seconds(seconds: float) -> str:
    """`seconds` in words, such as "3.2 hours", in the largest unit that gives 1 or more."""
    for name, one in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= one:
            return f"{seconds / one:.1f} {name}"
    return f"{seconds:.0f} seconds"
