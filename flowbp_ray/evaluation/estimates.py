"""What a set of pictures is worth: rewards, monitors, and the truth where the prompts state it. With 95 % intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flowbp_ray.prompts import PromptRecord

Z = 1.959963984540054  # two-sided 95 %


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` pictures with its 95 % interval, which a single picture does not have; of none, no mean."""

    mean: float | None
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class Evaluation:
    """values: per-picture numbers by metric, in the order of the prompts; scalars: numbers of the whole set."""

    values: Mapping[str, np.ndarray]
    scalars: Mapping[str, float]
    skills: tuple[str, ...]

    def estimates(self) -> dict[str, Estimate]:
        """Every metric over all pictures; where prompts name skills, verdicts (0 or 1) also as `<metric>/<skill>`.

        `<metric>/overall` is then the mean over the skills' means: the published value of GenEval, whose six tags have
        80 to 100 prompts each.
        """
        result = {name: estimate(v) for name, v in self.values.items()}
        skills = [skill for skill in dict.fromkeys(self.skills) if skill]
        for name, values in self.values.items() if skills else ():
            if not set(np.unique(values[np.isfinite(values)])) <= {0.0, 1.0}:
                continue
            parts = {skill: estimate(values[[s == skill for s in self.skills]]) for skill in skills}
            result |= {f"{name}/{skill}": part for skill, part in parts.items()}
            result[f"{name}/overall"] = balanced(list(parts.values()))
        return result

    def as_dict(self) -> dict[str, Any]:
        scalars = {name: value if np.isfinite(value) else None for name, value in self.scalars.items()}
        return {name: asdict(e) for name, e in self.estimates().items()} | scalars


def estimate(values: np.ndarray) -> Estimate:
    """Mean and 95 % interval of the finite ones: Wilson's for zeros and ones (1927), the normal one otherwise."""
    values = values[np.isfinite(values)]
    if not len(values):
        return Estimate(None, None, None, 0)
    n, mean = len(values), float(np.mean(values))
    if set(np.unique(values)) <= {0.0, 1.0}:
        centre = (mean + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z / (1 + Z * Z / n) * float(np.sqrt(mean * (1 - mean) / n + Z * Z / (4 * n * n)))
        return Estimate(mean, centre - half, centre + half, n)
    return _normal(values)


def balanced(parts: Sequence[Estimate]) -> Estimate:
    """The mean of k means with its 95 % interval, each part weighing the same; of parts without a mean, no mean.

        m − √Σ((m_i − low_i) / k)²  to  m + √Σ((high_i − m_i) / k)²

    (MOVER, Zou and Donner 2008: it keeps Wilson's asymmetry where the parts are shares, and is the stratified
    normal interval where they are normal.) A part with a single picture has no interval, nor has the whole then.
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


def paired(before: np.ndarray, after: np.ndarray) -> Estimate:
    """The mean difference of the same prompts with the same noise, with its 95 % interval (paired, normal)."""
    delta = np.asarray(after, float) - np.asarray(before, float)
    return _normal(delta[np.isfinite(delta)])


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
    drawn: np.ndarray,
) -> Evaluation:
    """Collect the scores, and ask the exact verifier where the prompts carry claims (the shapes domain).

    drawn [n] bool: which pictures are one, their latents being finite; the verifier has no answer for the others.
    """
    values = {name: np.asarray(v, float) for name, v in scores.items()}
    scalars: dict[str, float] = {}
    if all("claim" in r.extra for r in records):
        from flowbp_ray.shapes import Prompt, colour_entropy, verify

        prompts = [Prompt.from_json({"prompt": r.text, **r.extra}) for r in records]
        answers = np.array([verify(i, p) for i, p in zip(images, prompts, strict=True)], float)
        values["verifier"] = np.where(drawn, answers, np.nan)
        seen = [p for p, there in zip(prompts, drawn, strict=True) if there]
        scalars["colour_entropy_bits"] = float(colour_entropy(images[drawn], seen))
    skills = tuple(r.skill for r in records)
    return Evaluation(values, scalars, skills)


NONE = "none finite"
