"""The results of an evaluation of its own: a value per picture, means with bootstrap intervals, paired differences."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowbp_ray.evaluation.estimates import Estimate
from flowbp_ray.prompt_files import PromptRecord
from flowbp_ray.utils.files import write_atomically
from flowbp_ray.utils.text_files import read_json

RESAMPLES = 9999
SETTINGS, TABLE, SUMMARY = "settings.json", "results.parquet", "results.json"
Values = Mapping[float, Mapping[str, np.ndarray]]
"""guidance -> metric -> [prompts, pictures] float; NaN where there is no value."""


@dataclass(frozen=True)
class Results:
    """What was measured. prompts: text and skill of each, in the file's order. settings: all that decides a value."""

    settings: Mapping[str, Any]
    prompts: Sequence[tuple[str, str]]
    values: Values

    def by_prompt(self, guidance: float, metric: str) -> np.ndarray:
        """A metric's mean over the pictures of each prompt [prompts]; NaN where none of them has a value."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a mean of nothing but NaN
            return np.asarray(np.nanmean(self.values[guidance][metric], axis=1))

    def summary(self) -> dict[str, Any]:
        """For JSON: the settings, and by guidance each metric's mean with its interval, over all and by skill."""
        found: dict[str, Any] = {"settings": dict(self.settings), "guidance": {}}
        for guidance, metrics in self.values.items():
            part = found["guidance"][f"{guidance:g}"] = {}
            for metric in metrics:
                values = self.by_prompt(guidance, metric)
                part[metric] = asdict(bootstrap(values))
                for skill in dict.fromkeys(s for _, s in self.prompts if s):
                    rows = [s == skill for _, s in self.prompts]
                    part[f"{metric}/{skill}"] = asdict(bootstrap(values[rows]))
        return found

    def write(self, folder: Path) -> None:
        """Write results.parquet, a row per picture, and results.json."""
        import pyarrow as pa
        from pyarrow import parquet

        rows: list[dict[str, Any]] = []
        for guidance, metrics in self.values.items():
            for i, (text, skill) in enumerate(self.prompts):
                for picture in range(int(self.settings["pictures"])):
                    row = {"prompt_id": i, "prompt": text, "skill": skill, "guidance": guidance, "picture": picture}
                    rows.append(row | {name: float(v[i, picture]) for name, v in metrics.items()})
        write_atomically(folder / TABLE, lambda path: parquet.write_table(pa.Table.from_pylist(rows), path))
        text = json.dumps(self.summary(), indent=1) + "\n"
        write_atomically(folder / SUMMARY, lambda path: path.write_text(text))

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Read what `write` wrote. Raises ValueError where the folder has no finished evaluation."""
        from pyarrow import parquet

        if not ((folder / TABLE).is_file() and (folder / SETTINGS).is_file()):
            raise ValueError(f"{folder} has no {TABLE}; write the folder of an evaluation that has ended")
        settings = read_json(folder / SETTINGS, str(folder / SETTINGS))
        try:
            columns = parquet.read_table(folder / TABLE).to_pydict()
        except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors
            why = " ".join(str(error).split())[:200]
            raise ValueError(f"{folder / TABLE} cannot be read ({why}); run that evaluation again") from error
        count, pictures = int(settings["prompts"]), int(settings["pictures"])
        known = ("prompt_id", "prompt", "skill", "guidance", "picture")
        values: dict[float, dict[str, np.ndarray]] = {}
        guidance = np.array(columns["guidance"], float)
        for scale in dict.fromkeys(guidance.tolist()):
            at = guidance == scale
            values[scale] = {
                name: np.array(column, float)[at].reshape(count, pictures)
                for name, column in columns.items()
                if name not in known
            }
        first = slice(0, count * pictures, pictures)
        return cls(settings, list(zip(columns["prompt"][first], columns["skill"][first], strict=True)), values)


@dataclass(frozen=True)
class Difference:
    """One model less another over the same prompts and noise. p: of the two-sided sign test, ties left out."""

    estimate: Estimate
    above: int
    below: int
    p: float


def bootstrap(values: np.ndarray) -> Estimate:
    """Mean of the finite values [prompts] and its 95 % percentile bootstrap interval; none for fewer than two.

    The resamples are drawn with a fixed seed, so that the same values have the same interval.
    """
    from scipy.stats import bootstrap as resample

    values = values[np.isfinite(values)]
    if not len(values):
        return Estimate(None, None, None, 0)
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, None, None, len(values))
    rng = np.random.default_rng(0)
    found = resample((values,), np.mean, n_resamples=RESAMPLES, batch=256, method="percentile", rng=rng)
    low, high = found.confidence_interval
    return Estimate(mean, float(low), float(high), len(values))


def check_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Raises ValueError where prompts, noise, sampling steps or pictures per prompt differ between two settings."""
    for key in ("prompts_digest", "seed", "num_steps", "pictures", "size"):
        if one[key] != other[key]:
            raise ValueError(
                f"the evaluations differ in {key} ({one[key]} and {other[key]}), so their "
                "pictures are not of the same prompts and noise; evaluate both alike"
            )


def _scored_by(results: Results, metric: str) -> Any:
    """Kind and options of the reward that gives a metric; None for the verifier's and the meter's."""
    rewards = results.settings["rewards"]
    found = {r["name"]: (r["kind"] or r["name"], r["options"]) for r in [*rewards["terms"], *rewards["monitors"]]}
    return found.get(metric)


def compare(one: Results, other: Results) -> dict[float, dict[str, Difference]]:
    """`one` less `other` for each guidance and metric that both have, from a reward of the same kind and options.

    Raises ValueError where prompts, noise, sampling steps or pictures per prompt differ, or nothing is common.
    """
    from scipy.stats import binomtest

    check_alike(one.settings, other.settings)
    found: dict[float, dict[str, Difference]] = {}
    for guidance in (g for g in one.values if g in other.values):
        both = (m for m in one.values[guidance] if m in other.values[guidance])
        for metric in (m for m in both if _scored_by(one, m) == _scored_by(other, m)):
            delta = one.by_prompt(guidance, metric) - other.by_prompt(guidance, metric)
            above, below = int((delta > 0).sum()), int((delta < 0).sum())
            p = float(binomtest(above, above + below).pvalue) if above + below else 1.0
            found.setdefault(guidance, {})[metric] = Difference(bootstrap(delta), above, below, p)
    if not found:
        raise ValueError("the evaluations have no guidance and metric in common; evaluate both with the same ones")
    return found


def prompts_of(records: Sequence[PromptRecord]) -> list[tuple[str, str]]:
    """Text and skill of each prompt."""
    return [(record.text, record.skill) for record in records]
