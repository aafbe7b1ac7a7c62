"""The prompts of a run, and which of them a step draws. The step determines the position, so there is no state.

Each epoch is a shuffle by the seed of as many places as there are prompts. With weights (`data.weights`) a prompt has
as many places in an epoch as its share of all weights, rounded down or up, and over the epochs exactly its share:
systematic sampling, in which place k of n takes the prompt at (k + u)/n of the cumulated weights, with one u of an
epoch. Equal weights draw as no weights do, each prompt once in an epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from flowbp_ray.config.data import HELD_OUT, HeldOutConfig
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.prompt_files import PromptRecord, Reading, load, select
from flowbp_ray.utils.random import stream
from flowbp_ray.utils.text_files import shown

__all__ = [
    "Needs",
    "PromptRecord",
    "drawn",
    "evaluation_prompts",
    "ids_of_step",
    "load",
    "read_prompts",
    "training_prompts",
    "weights_of",
]

Weights = tuple[float, ...]
"""A weight for each training prompt; empty where all are drawn equally often."""


def ids_of_step(count: int, per_step: int, step: int, seed: int, weights: Weights = ()) -> list[int]:
    """The prompt ids of a step. Each epoch is a new permutation of 0…count−1; a step may span two epochs."""
    return _ids_between(count, step * per_step, (step + 1) * per_step, seed, weights)


def _ids_between(count: int, first: int, last: int, seed: int, weights: Weights = ()) -> list[int]:
    """The prompt ids at the positions first…last−1 of all epochs one after the other."""
    ids: list[int] = []
    while first < last:
        epoch, offset = divmod(first, count)
        draws = stream(seed, "prompt", epoch)
        places = draws.permutation(count)[offset : offset + last - first]
        if weights:
            at = (places + draws.random()) / count  # in 0..1 of the cumulated weights
            places = np.searchsorted(_cumulated(weights), at, side="right").clip(max=_last_drawn(weights))
        ids += places.tolist()
        first += len(places)
    return ids


@lru_cache(maxsize=4)
def _cumulated(weights: Weights) -> np.ndarray:
    """The sum of the weights up to each prompt as a share of all, fp64 [count]."""
    total = np.cumsum(np.asarray(weights, np.float64))
    return total / total[-1]


@lru_cache(maxsize=4)
def _last_drawn(weights: Weights) -> int:
    """The last prompt with a weight above 0: rounding at the end of the cumulated weights draws no other."""
    return max(i for i, weight in enumerate(weights) if weight)


def drawn(
    config: RunConfig, training: int, held_out: int, first: int = 0, last: int | None = None, weights: Weights = ()
) -> list[int]:
    """The distinct ids of the prompts that a run draws from step `first` on, in the order in which it needs them.

    training, held_out: number of training prompts and of evaluation prompts, whose ids follow. The evaluation prompts
    stand where the next evaluation is: before step 0, or after the first step that is evaluated. last: the step before
    which it ends, with the evaluation there; None: the end of the run. weights: of the training prompts. With them
    prompts that two epochs do not draw stand at the end, if there are further epochs, whether one of these draws them
    or not.
    """
    per_step, every, steps = config.data.prompts_per_step, config.evaluation.every, config.steps
    last = steps if last is None else min(last, steps)
    due = 0 if first == 0 else min(steps, (first // every + 1) * every) if every else steps
    begin, middle, end = (step * per_step for step in (first, min(due, last), last))
    whole = begin + 2 * training  # as many positions in a row hold an epoch, and so every prompt without weights
    before = _ids_between(training, begin, min(middle, whole), config.seed, weights)
    after = _ids_between(training, max(begin, middle), min(end, whole), config.seed, weights)
    evaluated = range(training, training + held_out) if first < last and due <= last else ()
    rest = [i for i, weight in enumerate(weights) if weight] if end > whole else []
    return list(dict.fromkeys([*before, *evaluated, *after, *rest]))


@dataclass(frozen=True)
class Needs:
    """Which prompts the steps of a run need, those of its evaluations among them."""

    config: RunConfig
    training: int
    """Number of training prompts."""
    held_out: int = 0
    """Number of evaluation prompts, whose ids follow."""
    first: int = 0
    """The step at which the run begins: that of its newest checkpoint."""
    weights: Weights = ()
    """Of the training prompts."""

    def between(self, first: int, last: int | None = None) -> list[int]:
        """The distinct ids that the steps first…last−1 need (see `drawn`), in the order of need."""
        return drawn(self.config, self.training, self.held_out, first, last, self.weights)

    def last_steps(self) -> dict[int, int]:
        """The last step that needs each prompt of the run, or with weights a later one, up to two epochs before the
        end."""
        per_step, steps = self.config.data.prompts_per_step, self.config.steps
        begin = max(0, steps * per_step - 2 * self.training)  # as many positions in a row hold every prompt
        ids = _ids_between(self.training, begin, steps * per_step, self.config.seed, self.weights)
        earlier = {i: begin // per_step for i, weight in enumerate(self.weights) if weight} if begin else {}
        last = earlier | {prompt: (begin + i) // per_step for i, prompt in enumerate(ids)}
        return last | dict.fromkeys(range(self.training, self.training + self.held_out), steps - 1)


def weights_of(records: Sequence[PromptRecord]) -> Weights:
    """The weights of training prompts; empty where all are drawn equally often."""
    weights = tuple(record.weight for record in records)
    return () if len(set(weights)) <= 1 else weights


def read_prompts(config: RunConfig) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """Read the training and the evaluation prompts of a run."""
    training, kept = _split(config, _read(config))
    return training, _evaluated(config, kept, "evaluation.prompts")


def training_prompts(config: RunConfig) -> list[PromptRecord]:
    """Read the training prompts of a run, without those that `data.heldout` keeps from it."""
    return _split(config, _read(config))[0]


def evaluation_prompts(config: RunConfig, key: str = "evaluation.prompts") -> list[PromptRecord]:
    """Read the evaluation prompts of a run; none where nothing is evaluated. key: what names them, for messages."""
    kept = _split(config, _read(config))[1] if config.evaluation.prompts == HELD_OUT else []
    return _evaluated(config, kept, key)


def _read(config: RunConfig) -> list[PromptRecord]:
    data = config.data
    return load(
        data.prompts, "data.prompts", Reading("data", data.columns or {}, data.split, data.where or {}, data.weights)
    )


def _evaluated(config: RunConfig, kept: list[PromptRecord], key: str) -> list[PromptRecord]:
    """The evaluation prompts, of which `kept` are those that `data.heldout` keeps from training."""
    evaluation = config.evaluation
    if not evaluation.prompts:
        return []
    how = Reading("evaluation", evaluation.columns or {}, evaluation.split, evaluation.where or {})
    if evaluation.prompts == HELD_OUT:
        records = select(kept, f"{key}: prompts {HELD_OUT} of {config.data.prompts}", how)
    else:
        records = load(evaluation.prompts, key, how)
    return records[: evaluation.limit]


def _split(config: RunConfig, records: list[PromptRecord]) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """The prompts to train on, and those that `data.heldout` keeps from it. Raises ValueError where a side is empty."""
    if config.data.heldout is None:
        return records, []
    sides: tuple[list[PromptRecord], list[PromptRecord]] = ([], [])
    for record in records:
        sides[is_held_out(record.text, config.data.heldout)].append(record)
    for side, what, change in zip(sides, ("leaves none", "holds out none"), ("smaller", "larger"), strict=True):
        if not side:
            raise ValueError(
                f"data.heldout.fraction={config.data.heldout.fraction} {what} of the {len(records)} prompts of "
                f"{config.data.prompts}; write a {change} fraction, or another data.heldout.seed"
            )
    if config.data.weights is not None and not any(record.weight for record in sides[0]):
        raise ValueError(
            f"data.weights: {shown(config.data.weights)} is 0 for all prompts of {config.data.prompts} that "
            "data.heldout leaves; write another data.heldout.seed"
        )
    return sides


def is_held_out(text: str, heldout: HeldOutConfig) -> bool:
    """Whether a prompt is held out: by the sha256 of seed and text, in which case and blanks do not count."""
    words = f"{heldout.seed} {' '.join(text.split()).casefold()}"
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") < heldout.fraction * 2**64
