"""Checks of a reward server's answers: for this item, by these rewards, of these shapes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.messages import Evaluated, Fault, Item, Packed, Scored
from flowbp_ray.rewards.remote.limits import cotangent_shape, images_shape


def wrong_score(config: RunConfig, item: Item, target: Packed, scored: Scored, cotangent: Packed) -> str | None:
    """What is not as `Scorer.score` would answer to target [rows, branches, ...], or None. Values may be anything."""
    return next(_score_faults(config, item, target, scored, cotangent), None)


def wrong_evaluation(config: RunConfig, item: Item, evaluated: Evaluated) -> str | None:
    """What is not as `Scorer.evaluate` would answer, or None. Scores may be anything."""
    return next(_evaluation_faults(config, item, evaluated), None)


def _score_faults(config: RunConfig, item: Item, target: Packed, scored: Scored, cotangent: Packed) -> Iterator[str]:
    rows, branches = target.array.shape[:2]
    trained = [term.name for term in config.rewards.differentiable]
    names = trained + [term.name for term in config.rewards.scored if not term.judged]
    if (scored.step, scored.index) != (item.step, item.index):
        yield f"step {scored.step}, item {scored.index} for step {item.step}, item {item.index}"
    for what, found, known in (("scores", scored.scores, names), ("clipped", scored.clipped, trained)):
        if found.keys() != set(known):
            yield f"{what} of {_listed(found)} for {_listed(known)}"
    for name, lines in scored.scores.items():
        if not _sized(lines, rows, branches):
            yield f"scores of {name} must be [{rows}, {branches}]"
    if len(scored.losses) != rows:
        yield f"losses must be [{rows}], got [{len(scored.losses)}]"
    if len(scored.gram) != rows or not all(_sized(line, len(trained), len(trained)) for line in scored.gram):
        yield f"gram must be [{rows}, {len(trained)}, {len(trained)}]"
    if cotangent.dtype != "float32" or cotangent.array.shape != cotangent_shape(config, target):
        shape = list(cotangent_shape(config, target))
        yield f"the cotangent must be float32 {shape}, got {cotangent.dtype} {list(cotangent.array.shape)}"
    if scored.cotangent_bytes != cotangent.nbytes:
        yield f"cotangent_bytes must be {cotangent.nbytes}, got {scored.cotangent_bytes}"
    if not 0 <= scored.seconds < np.inf:
        yield f"seconds must be a time, got {scored.seconds}"
    yield from (
        f"a fault that names nothing of the item: {fault}" for fault in scored.faults if not _own(fault, item, names)
    )


def _evaluation_faults(config: RunConfig, item: Item, evaluated: Evaluated) -> Iterator[str]:
    names, images = [reward.name for reward in config.rewards.all], evaluated.images
    if evaluated.index != item.index:
        yield f"item {evaluated.index} for item {item.index}"
    if evaluated.scores.keys() != set(names):
        yield f"scores of {_listed(evaluated.scores)} for {_listed(names)}"
    for name, row in evaluated.scores.items():
        if len(row) != item.rows:
            yield f"scores of {name} must be [{item.rows}], got [{len(row)}]"
    if len(evaluated.drawn) != item.rows:
        yield f"drawn must be [{item.rows}], got [{len(evaluated.drawn)}]"
    if images.dtype != np.uint8 or images.shape != images_shape(config, item.rows):
        yield f"images must be uint8 {list(images_shape(config, item.rows))}, got {images.dtype} {list(images.shape)}"
    if not 0 <= evaluated.seconds < np.inf:
        yield f"seconds must be a time, got {evaluated.seconds}"


def _own(fault: Fault, item: Item, names: Sequence[str]) -> bool:
    """Whether a fault is one that a scorer could find in this item: a report looks its prompt up."""
    pairs = zip(item.samples, item.prompt_ids, strict=True)
    known = fault.what in ("score", "cotangent") and fault.node is None and fault.reward in (None, *names)
    return known and fault.step == item.step and (fault.sample, fault.prompt) in pairs


def _sized(lines: Sequence[Sequence[float]], rows: int, columns: int) -> bool:
    return len(lines) == rows and all(len(line) == columns for line in lines)


def _listed(names: Collection[str]) -> str:
    """Names in the order of the alphabet; a server may have written anything."""
    return ascii(", ".join(sorted(names)))[1:-1][:200] or "nothing"
