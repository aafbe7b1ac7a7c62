"""The prompts of a run, shuffled in each epoch by the seed. The step determines the position, so there is no state."""

from __future__ import annotations

from dataclasses import dataclass

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.prompt_files import PromptRecord, load
from flowbp_ray.utils.random import stream

__all__ = ["Needs", "PromptRecord", "drawn", "ids_of_step", "load", "read_prompts"]


def ids_of_step(count: int, per_step: int, step: int, seed: int) -> list[int]:
    """The prompt ids of a step. Each epoch is a new permutation of 0…count−1; a step may span two epochs."""
    return _ids_between(count, step * per_step, (step + 1) * per_step, seed)


def _ids_between(count: int, first: int, last: int, seed: int) -> list[int]:
    """The prompt ids at the positions first…last−1 of all epochs one after the other."""
    ids: list[int] = []
    while first < last:
        epoch, offset = divmod(first, count)
        taken = stream(seed, "prompt", epoch).permutation(count)[offset : offset + last - first]
        ids += taken.tolist()
        first += len(taken)
    return ids


def drawn(config: RunConfig, training: int, held_out: int, first: int = 0, last: int | None = None) -> list[int]:
    """The distinct ids of the prompts that a run draws from step `first` on, in the order in which it needs them.

    training, held_out: number of training prompts and of evaluation prompts, whose ids follow. The evaluation prompts
    stand where the next evaluation is: before step 0, or after the first step that is evaluated. last: the step before
    which it ends, with the evaluation there; None: the end of the run.
    """
    per_step, every, steps = config.data.prompts_per_step, config.evaluation.every, config.steps
    last = steps if last is None else min(last, steps)
    due = 0 if first == 0 else min(steps, (first // every + 1) * every) if every else steps
    begin, middle, end = (step * per_step for step in (first, min(due, last), last))
    whole = begin + 2 * training  # as many positions in a row hold an epoch, and so every prompt
    before = _ids_between(training, begin, min(middle, whole), config.seed)
    after = _ids_between(training, max(begin, middle), min(end, whole), config.seed)
    evaluated = range(training, training + held_out) if first < last and due <= last else ()
    return list(dict.fromkeys([*before, *evaluated, *after]))


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

    def between(self, first: int, last: int | None = None) -> list[int]:
        """The distinct ids that the steps first…last−1 need (see `drawn`), in the order of need."""
        return drawn(self.config, self.training, self.held_out, first, last)

    def last_steps(self) -> dict[int, int]:
        """The last step that needs each prompt of the run."""
        per_step, steps = self.config.data.prompts_per_step, self.config.steps
        begin = max(0, steps * per_step - 2 * self.training)  # as many positions in a row hold every prompt
        ids = _ids_between(self.training, begin, steps * per_step, self.config.seed)
        last = {prompt: (begin + i) // per_step for i, prompt in enumerate(ids)}
        return last | dict.fromkeys(range(self.training, self.training + self.held_out), steps - 1)


def read_prompts(config: RunConfig) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """Read the training and the evaluation prompts of a run."""
    train, held_out = load(config.data.prompts, "data.prompts"), config.evaluation.prompts
    if not held_out:
        return train, []
    return train, load(held_out, "evaluation.prompts")[: config.evaluation.limit]
