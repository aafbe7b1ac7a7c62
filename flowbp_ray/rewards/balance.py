"""Norms and cosines of the rewards' gradients at the images, and factors that balance the norms.

g_m is the gradient of term m's part of the loss (see `objective`) at the images, which all rewards read: there each is
known before the backward through the decoder (as in Sener & Koltun, arXiv 1810.04650, §3.3, for tasks that share an
encoder). Over the rows of the global batch that are kept, each with its factor:

    G[m, n] = sum_rows factor² <g_m, g_n>,    norm_m = sqrt(G[m, m]),    cosine_mn = G[m, n] / (norm_m norm_n)

`balance: grad_norm` multiplies the cotangent of term m by

    s_m = |w_m| / (sum_n |w_n|) * (sum_n norm_n) / norm_m          (sums over the terms with a gradient)

so that each contributes as much as its weight says, whatever the unit of its score, and the norms keep their sum. The
norms are sums over rows: splitting the batch over micro-batches or reward servers cannot change them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from flowbp_ray.messages import Scored


def gram(scored: Sequence[Scored], factors: Sequence[float]) -> np.ndarray:
    """G [M, M] in fp64 of a batch; scored in the order of their items, factors one per row (see `Selection`)."""
    rows = np.array([row for part in scored for row in part.gram], dtype=np.float64)  # [rows, M, M]
    rows = rows.reshape(*rows.shape[:2], rows.shape[1])  # also without terms, where the last axis is lost
    return np.einsum("r,rmn->mn", np.square(np.asarray(factors, np.float64)), rows)


def shares(gram: np.ndarray, weights: Sequence[float]) -> tuple[float, ...]:
    """s [M] of the module docstring; 0 for a term without a gradient."""
    norms = np.sqrt(np.diag(gram))
    active = norms > 0
    asked = np.abs(np.asarray(weights, np.float64)) * active
    if not asked.any():
        return (0.0,) * len(norms)
    safe = np.where(active, norms, 1.0)
    return tuple((asked / asked.sum() * norms.sum() / safe * active).tolist())


def strengths(names: Sequence[str], gram: np.ndarray) -> Mapping[str, float]:
    """`reward_grad_norm/<name>`, and for each pair `reward_grad_cosine/<a>,<b>`; NaN where one has no gradient."""
    norms = np.sqrt(np.diag(gram))
    found = {f"reward_grad_norm/{name}": float(norm) for name, norm in zip(names, norms, strict=True)}
    for m, a in enumerate(names):
        for n in range(m + 1, len(names)):
            product = float(norms[m] * norms[n])
            found[f"reward_grad_cosine/{a},{names[n]}"] = float(gram[m, n]) / product if product else float("nan")
    return found
