"""Fingerprints of weights: of fragments as of the whole, and by their formula."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from flowbp_ray.utils.checksums import TensorChecksum, combine
from flowbp_ray.weights.fingerprint import _HOST_CHUNK, checksum, fingerprint


def test_fragments_add_up_to_the_fingerprint_of_the_whole() -> None:
    """Cut anywhere, in any order; what is moved, stale or missing is seen."""
    whole = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    cuts = [0, 1, 17, 600, 1000]
    parts = [checksum(whole[a:b], a) for a, b in pairwise(cuts)]
    stated = [{"w": TensorChecksum((1000,), "torch.float32", value)} for value in reversed(parts)]
    assert combine(stated) == fingerprint({"w": whole})
    swapped = whole.clone()
    swapped[[3, 4]] = whole[[4, 3]]
    stale = whole.clone()
    stale[500] += 1e-6
    seen = {fingerprint({"w": w}) for w in (whole, swapped, stale, whole.bfloat16(), whole.view(10, 100))}
    assert len(seen) == 5
    bits = whole.numpy().view(np.int32).astype(object)
    want = sum(int(b) * (2 * i + 1) for i, b in enumerate(bits))
    assert checksum(whole) == (want + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [(torch.int8, np.int8), (torch.bfloat16, np.int16), (torch.float32, np.int32), (torch.float64, np.int64)],
)
def test_a_checksum_is_that_of_the_formula_over_several_chunks(dtype: torch.dtype, bits: type) -> None:
    """Against integers without overflow, for tensors longer than what is summed at a time."""
    size, start = 2 * _HOST_CHUNK + 3, 1 << 40
    whole = (50 * torch.randn(size, generator=torch.Generator().manual_seed(1))).to(dtype)
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[whole.element_size()]
    elements = whole.view(kind).numpy()
    assert elements.dtype == bits
    want = sum(int(b) * (2 * (start + i) + 1) for i, b in enumerate(elements))
    assert checksum(whole, start) == (want + 2**63) % 2**64 - 2**63
    assert checksum(whole[:0], start) == 0
