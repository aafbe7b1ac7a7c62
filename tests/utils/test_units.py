"""Numbers of bytes for people."""

from __future__ import annotations

import pytest

from flowbp_ray.utils.units import format_bytes


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (10 * 1024, "10.0 KiB"), (3.5 * 2**30, "3.50 GiB")],
)
def test_the_unit_is_the_largest_that_gives_one_or_more(nbytes: float, text: str) -> None:
    assert format_bytes(nbytes) == text


def test_a_fixed_unit_has_one_decimal() -> None:
    assert format_bytes(2**40, "GiB") == "1024.0 GiB" and format_bytes(2**19, "MiB") == "0.5 MiB"
