"""Estimates of an evaluation: means of each metric over a set of pictures, with 95 % intervals.

The metrics are the rewards, the monitors, and the exact verifier where the prompts carry claims (the shapes domain).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flowbp_ray.prompts import PromptRecord

Z = 1.959963984540054  # two-sided 95 %
NONE = "none finite"  # what is printed in the place of a mean over no finite value


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` pictures with its 95 % interval. One picture has no interval, no picture has no mean."""

    mean: float | None
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a set of pictures.

    values: [pictures] fp64 by metric, in the order of the prompts; NaN where there is none. scalars: numbers of the
    whole set. skills: of each prompt, "" where it names none.
    """

    values: Mapping[str, np.ndarray]
    scalars: Mapping[str, float]
    skills: tuple[str, ...]

    def estimates(self) -> dict[str, Estimate]:
        """Estimates by name: each metric over all pictures, and by skill where prompts name skills.

        A metric of verdicts (0 or 1) is then also there as `<metric>/<skill>`, and `<metric>/overall` is the mean over
        the skills' means: the published value of GenEval, whose six tags have 80 to 100 prompts each.
        """
        result = {name: estimate(v) for name, v in self.values.items()}
        for name, values in self.values.items():
            result |= _by_skill(name, {skill: estimate(values[rows]) for skill, rows in self._skilled(name).items()})
        return result

    def changes(self, after: Evaluation) -> dict[str, Estimate]:
        """Paired differences to `after`, of the same metrics and pictures, by the names of `estimates`.

        A metric without a difference that is finite is left out.
        """
        result = {}
        for name, values in self.values.items():
            if not np.isfinite(values - after.values[name]).any():
                continue
            result[name] = paired_difference(values, after.values[name])
            rows_of = self._skilled(name)
            parts = {s: paired_difference(values[rows], after.values[name][rows]) for s, rows in rows_of.items()}
            result |= _by_skill(name, parts)
        return result

    def repeats(self, name: str) -> bool:
        """Whether a metric has, picture by picture, the verdicts of the exact verifier, both yes and no, as its own."""
        verdicts = self.values.get("verifier")
        if name == "verifier" or verdicts is None or len(np.unique(verdicts[np.isfinite(verdicts)])) < 2:
            return False
        return np.array_equal(self.values[name], verdicts, equal_nan=True)

    def _skilled(self, name: str) -> dict[str, list[bool]]:
        """Which pictures are of each skill, for a metric of verdicts; nothing for another, or without skills."""
        values = self.values[name]
        if not set(np.unique(values[np.isfinite(values)])) <= {0.0, 1.0}:
            return {}
        return {skill: [s == skill for s in self.skills] for skill in dict.fromkeys(self.skills) if skill}

    def means(self) -> dict[str, float | None]:
        """The estimates' means and the scalars by name; None for a mean over no finite value."""
        return {name: e.mean for name, e in self.estimates().items()} | dict(self.scalars)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the estimates as dictionaries and the scalars, None where a number is not finite."""
        scalars = {name: value if np.isfinite(value) else None for name, value in self.scalars.items()}
        return {name: asdict(e) for name, e in self.estimates().items()} | scalars


def estimate(values: np.ndarray) -> Estimate:
    """Mean and 95 % interval of the finite values: Wilson's (1927) for zeros and ones, the normal one otherwise."""
    values = values[np.isfinite(values)]
    if not len(values):
        return Estimate(None, None, None, 0)
    n, mean = len(values), float(np.mean(values))
    if set(np.unique(values)) <= {0.0, 1.0}:
        from scipy.stats import binomtest  # takes a second to import, which other commands need not wait for

        interval = binomtest(int(values.sum()), n).proportion_ci(confidence_level=0.95, method="wilson")
        return Estimate(mean, float(interval.low), float(interval.high), n)
    return _normal(values)


def mean_of_means(parts: Sequence[Estimate]) -> Estimate:
    """The mean of k means m_i with its 95 % interval; each part weighs the same. No mean where a part has none.

        m − √Σ((m_i − low_i) / k)²  to  m + √Σ((high_i − m_i) / k)²

    This is MOVER (Zou and Donner 2008). It keeps Wilson's asymmetry where the parts are shares, and is the stratified
    normal interval where the parts' intervals are normal. Where a part has no interval, the whole has none either.
    """
    k, count = len(parts), sum(part.count for part in parts)
    means = [part.mean for part in parts if part.mean is not None]
    if len(means) < k:
        return Estimate(None, None, None, count)
    mean = sum(means) / k
    below = [part.mean - part.low for part in parts if part.mean is not None and part.low is not None]
    above = [part.high - part.mean for part in parts if part.mean is not None and part.high is not None]
    if len(below) < k or len(above) < k:
        return Estimate(mean, None, None, count)
    return Estimate(mean, mean - float(np.linalg.norm(below)) / k, mean + float(np.linalg.norm(above)) / k, count)


def paired_difference(before: np.ndarray, after: np.ndarray) -> Estimate:
    """Mean and 95 % interval of after − before, of the same prompts with the same noise (paired, normal)."""
    delta = np.asarray(after, float) - np.asarray(before, float)
    delta = delta[np.isfinite(delta)]
    return _normal(delta) if len(delta) else Estimate(None, None, None, 0)


def _by_skill(metric: str, parts: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """The parts as <metric>/<skill>, and <metric>/overall; nothing without parts."""
    if not parts:
        return {}
    return {f"{metric}/{skill}": part for skill, part in parts.items()} | {
        f"{metric}/overall": mean_of_means(list(parts.values()))
    }


def _normal(values: np.ndarray) -> Estimate:
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Estimate(mean, None, None, n)
    half = Z * float(np.std(values, ddof=1)) / float(np.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n)


def measure(
    images: np.ndarray,  # [n, H, W, 3] uint8
    records: Sequence[PromptRecord],
    scores: Mapping[str, Sequence[float]],
    drawn: np.ndarray,  # [n] bool
) -> Evaluation:
    """Collect the scores, and ask the exact verifier and the quality meter where the prompts carry claims (shapes).

    drawn: False where a picture's latents were not finite; the values of verifier and meter are NaN there.
    """
    values = {name: np.asarray(v, float) for name, v in scores.items()}
    scalars: dict[str, float] = {}
    if all("claim" in r.extra for r in records):
        from flowbp_ray.shapes import Prompt, colour_entropy, quality, verify

        prompts = [Prompt.from_json({"prompt": r.text, **r.extra}) for r in records]
        answers = np.array([verify(i, p) for i, p in zip(images, prompts, strict=True)], float)
        values["verifier"] = np.where(drawn, answers, np.nan)
        values["quality"] = np.where(drawn, [quality(i).mean for i in images], np.nan)
        verified = [p for p, finite in zip(prompts, drawn, strict=True) if finite]
        scalars["colour_entropy_bits"] = float(colour_entropy(images[drawn], verified))
    skills = tuple(r.skill for r in records)
    return Evaluation(values, scalars, skills)
