"""Whether a second run of the same configuration gave the same numbers and weights, bit for bit, and where not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flowbp_ray.config import loading
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.observability.catalog import find
from flowbp_ray.prompts import read_prompts, weights_of
from flowbp_ray.run import environment
from flowbp_ray.run.folder import Run, comparable, differences
from flowbp_ray.utils.diff import differing, shown
from flowbp_ray.utils.digest import digest

COMPUTED = ("drift", "gradient", "loss", "reward", "sample")
"""The catalog's groups that the configuration decides; times, bytes, queues and retries are how a run went."""
Key = tuple[int, str, str]
"""Step, kind of line, and the guidance of an evaluation."""


@dataclass(frozen=True)
class Difference:
    """The first number that differs: metric of a line; None stands for a line or a number that is not there."""

    step: int
    where: str
    metric: str
    first: Any
    second: Any

    def describe(self) -> str:
        return f"{self.where} {self.step}: {self.metric} was {shown(self.first)}, is {shown(self.second)}"


@dataclass(frozen=True)
class Reproduction:
    """Two runs beside each other. weights: the digests of the last weights. numbers: how many were compared."""

    weights: tuple[str, str]
    numbers: int
    difference: Difference | None
    versions: tuple[str, ...]

    @property
    def identical(self) -> bool:
        """Whether all numbers and the weights are the same bits."""
        return self.difference is None and self.weights[0] == self.weights[1]

    def lines(self) -> list[str]:
        """What to tell: the verdict, the first difference, and versions that differ."""
        if self.identical:
            return [f"bit-identical: {self.numbers} numbers and the weights (sha256 {self.weights[0][:16]}…)"]
        found = ["not bit-identical: " + (self.difference.describe() if self.difference else "all numbers are equal")]
        if self.weights[0] != self.weights[1]:
            found.append(f"weights: sha256 {self.weights[0][:16]}… and {self.weights[1][:16]}…")
        return found + [f"version: {line}" for line in self.versions]


def again(first: Run, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a run that is to give the same bits as `first`.

    Raises ValueError where it would be another run, or `first` has not ended, or its prompts have changed since.
    """
    if not (first.folder / "summary.json").is_file() or not first.checkpoints.steps():
        raise ValueError(f"{first.folder} has not ended, or has no checkpoint to compare; go on with it first")
    alone = ["tracking={wandb: false, tensorboard: false, mlflow: false}", "evaluation.base_cache=null"]
    over = [f"name={loading.quoted(f'{first.folder.name}_again')}", "resume=never", *alone, *overrides]
    config = loading.load(first.folder / "config.yaml", over)
    if different := differences(comparable(first.config), comparable(config) | {"name": first.config.name}):
        raise ValueError(f"that would be another run: {different[0]}; only where and how it runs may differ")
    training, held_out = read_prompts(config)
    first.check_prompts([record.text for record in (*training, *held_out)], weights_of(training))
    return config


def compare_runs(first: Run, second: Run) -> Reproduction:
    """Compare metrics.jsonl line by line, and the weights of the newest checkpoint that both have.

    Raises ValueError where they have no checkpoint of the same step.
    """
    common = sorted(set(first.checkpoints.steps()) & set(second.checkpoints.steps()))
    if not common:
        raise ValueError(f"{first.folder} and {second.folder} have no checkpoint of the same step to compare")
    step = common[-1]
    digests = [digest(run.checkpoints.weights(step)[1]) for run in (first, second)]
    numbers = [_numbers(run, step) for run in (first, second)]
    differences = list(_differences(*numbers))
    versions = [(environment.read(run.folder) or [{}])[-1].get("versions", {}) for run in (first, second)]
    lines = tuple(f"{name} was {shown(a)}, is {shown(b)}" for name, a, b in differing(*versions))
    count = sum(map(len, numbers[0].values()))
    return Reproduction((digests[0], digests[1]), count, differences[0] if differences else None, lines)


def _numbers(run: Run, last: int) -> dict[Key, dict[str, Any]]:
    """What the configuration decides of each line up to step `last`; of lines that were written again, the last."""
    found: dict[Key, dict[str, Any]] = {}
    for line in run.metrics():
        step, kind = int(line["step"]), str(line["kind"])
        if step > last or (kind == "train" and step >= last):
            continue
        key = (step, kind, json.dumps([line.get("guidance"), line.get("judge")]))
        found[key] = {name: v for name, v in line.items() if _computed(name, kind)}
    return found


def _computed(name: str, kind: str) -> bool:
    if kind != "train":
        return name not in ("step", "kind")
    metric = find(name)
    return metric is not None and metric.group in COMPUTED


def _differences(one: dict[Key, dict[str, Any]], other: dict[Key, dict[str, Any]]) -> Iterator[Difference]:
    """In the order of the run: an evaluation at a step comes before the step."""
    for key in sorted(one.keys() | other.keys()):
        where = "training step" if key[1] == "train" else f"{key[1]} after step"
        a, b = one.get(key), other.get(key)
        if a is None or b is None:
            yield Difference(key[0], where, "the line", "there" if a else None, "there" if b else None)
            continue
        for name, left, right in differing(a, b):
            if left == left or right == right:  # NaN is NaN
                yield Difference(key[0], where, name, left, right)
