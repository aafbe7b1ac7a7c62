"""How good each image of a batch is beside the others of its prompt: r of DiffusionNFT (arXiv 2509.16117, §3).

For each term, over the rows that are kept:  r = ½ + ½·clip((score − mean of the prompt's images) / (c·std), −1, 1),
std being that of the whole batch's scores, or of the prompt's. No constant is added to it, so the unit of a score does
not matter; where it is 0 all images are alike. Rows of several terms have the mean of their r by the terms' weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flowbp_ray.rewards import balance


@dataclass(frozen=True)
class Compared:
    """A batch's images beside those of their prompts.

    terms: [terms, rows] fp64, r of each term. rows: [rows], their mean by the terms' weights; NaN where nothing is
    learned. alike: share of the prompts whose images all have the same scores. unscored: share of those with an image
    without a score, or with fewer than two images that are kept.
    """

    terms: np.ndarray
    rows: np.ndarray
    alike: float
    unscored: float


def compare(
    scores: Sequence[Sequence[float]],
    weights: Sequence[float],
    images: int,
    kept: Sequence[bool],
    clip: float,
    std: Literal["batch", "prompt"] = "batch",
) -> Compared:
    """Compare a batch. scores: [terms, rows]; the `images` images of a prompt are adjacent rows. kept: per row.

    NaN is no score, which leaves out the other images of the prompt too: their mean would be another.
    """
    table = np.asarray(scores, np.float64).reshape(len(weights), -1, images)  # [terms, prompts, images]
    used = np.asarray(kept, bool).reshape(-1, images)
    missing = (~np.isfinite(table).all(axis=0) & used).any(axis=1) | (used.sum(axis=1) < 2)
    used = used & ~missing[:, None]
    result, weighted, different = np.full(table.shape, np.nan), np.zeros(used.shape), np.zeros(len(used), bool)
    for term, (values, weight) in enumerate(zip(table, weights, strict=True)):
        masked = np.where(used, values, np.nan)
        of_batch = float(np.nanstd(masked)) if used.any() else 0.0
        for prompt in np.flatnonzero(used.any(axis=1)):
            mine = masked[prompt]
            wide = of_batch if std == "batch" else float(np.nanstd(mine))
            away = mine - np.nanmean(mine)
            differ = bool(np.nanmax(mine) > np.nanmin(mine))
            different[prompt] |= differ
            result[term, prompt] = 0.5 + 0.5 * np.clip(away / (clip * wide), -1, 1) if differ else 0.5 + 0.0 * mine
        weighted += weight / sum(weights) * np.nan_to_num(result[term], nan=0.5)
    rows = np.where(used & different[:, None], weighted, np.nan)
    return Compared(
        result.reshape(len(weights), -1),
        rows.ravel(),
        float(np.mean(~different & ~missing)),
        float(np.mean(missing)),
    )


def strengths(
    compared: Compared,
    names: Sequence[str],
    weights: Sequence[float],
    factors: Sequence[float],
    signal: Sequence[float],
) -> Mapping[str, float]:
    """Norms and cosines of the terms' gradients at the velocities, under the names of `rewards.balance.strengths`.

    A term's part of the loss that depends on its scores has the gradient weight · factor / B · (r − ½) · d cotangent/dr
    at a row's velocities; signal: [rows], the squared norm of the last (see `StepReport`).
    """
    rows = np.asarray(factors, np.float64) / len(factors) * np.sqrt(np.nan_to_num(np.asarray(signal, np.float64)))
    parts = np.asarray(weights)[:, None] * rows * np.nan_to_num(compared.terms - 0.5)
    return balance.strengths(names, parts @ parts.T)
