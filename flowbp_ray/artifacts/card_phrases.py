"""How a model card words what a run learned from: its prompts, its method, its terms, and its judges."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from flowbp_ray.backbones.guidance import distilled_guidance, held_guidance
from flowbp_ray.config.data import HELD_OUT, DataConfig
from flowbp_ray.config.rewards import TermConfig
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.config.sections import EvaluationConfig
from flowbp_ray.judges.config import JudgeConfig
from flowbp_ray.surrogate.methods import METHODS


def ways_of_learning(config: RunConfig) -> list[str]:
    """How the run learned: from its rewards, and from the base at another guidance."""
    ways: dict[str, Any] = {
        "reward backpropagation": config.rewards.differentiable,
        "DiffusionNFT": config.rewards.scored,
        "guidance distillation": distilled_guidance(config),
    }
    return [way for way, there in ways.items() if there]


def describe_penalty(config: RunConfig) -> str:
    """Whether and at which guidance the model was held to the base."""
    penalty, (learned, held) = config.learners.base_penalty, held_guidance(config)
    if penalty is None or penalty.weight == 0:
        return "not penalised"
    if distilled_guidance(config) is None:
        return f"penalised with weight {penalty.weight:g}"
    return (
        f"guidance distillation: what is learned at guidance {learned:g} is held to the base at guidance {held:g}, "
        f"with weight {penalty.weight:g}"
    )


def caution_of_distillation(config: RunConfig) -> str:
    """What scores before and after do not tell of a run that distilled guidance; "" for any other."""
    held = distilled_guidance(config)
    if held is None:
        return ""
    return (
        f"The run distilled guidance {held:g} of the base, which changes scores by itself: what the rewards did shows "
        "only beside the same run with next to no weight on them, and beside the base at that guidance."
    )


def describe_method(spec: dict[str, Any] | None) -> str:
    """A named method with all its arguments, those left at their defaults too."""
    if spec is None:
        return "none: no term has a gradient"
    name = spec.get("name")
    if name is None:
        return "spelled out by axis"
    defaults = {p.name: p.default for p in inspect.signature(METHODS[name]).parameters.values()}
    arguments = defaults | {key: value for key, value in spec.items() if key != "name"}
    return f"`{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})`"


def describe_reading(config: RunConfig) -> dict[str, str]:
    """Rows on how prompts were read from their files and chosen, to train on and to evaluate on; what is not set is
    left out."""
    data, evaluation = config.data, config.evaluation
    rows = _reading(data)
    rows["drawn"] = f"in proportion to {_code(data.weights)}" if data.weights else ""
    if data.heldout is not None:
        rows["held out of training"] = f"{100 * data.heldout.fraction:g} % of the prompts, seed {data.heldout.seed}"
    if evaluation.prompts:
        of = "of those held out: " if evaluation.prompts == HELD_OUT else ""
        rows |= {f"evaluation {name}": of + text for name, text in _reading(evaluation).items() if text}
        rows["evaluation limit"] = f"the first {evaluation.limit}" if evaluation.limit else ""
    return {name: text for name, text in rows.items() if text}


def _reading(how: DataConfig | EvaluationConfig) -> dict[str, str]:
    chosen = how.where or {}
    return {
        "columns": ", ".join(f"{_code(ours)} from {_code(theirs)}" for ours, theirs in (how.columns or {}).items()),
        "split": _code(how.split) if how.split else "",
        "only where": " and ".join(f"{_code(name)} is {_any_of(values)}" for name, values in chosen.items()),
    }


def _any_of(values: list[str]) -> str:
    return " or ".join(_code(value) for value in values)


def _code(value: str) -> str:
    """A name of the user's as code of Markdown, in which no line and no code ends."""
    return f"`{' '.join(value.split()).replace('`', chr(39))}`"


def describe_term(config: RunConfig, term: TermConfig) -> str:
    """A term's name, and how it entered the loss."""
    if term.gradient == "pixels":
        return f"{term.name} (weight {term.weight:g}, clip {term.clip:g}, scale {term.scale:g})"
    nft = config.nft
    return (
        f"{term.name} (weight {term.weight:g}, without gradient, by DiffusionNFT (beta {nft.beta:g}, "
        f"clip {nft.clip:g}, times {nft.times}, std {nft.std}, policy {nft.policy}))"
    )


def measured_only(config: RunConfig) -> list[str]:
    """Names of what was measured and not trained on: monitors, and judges of evaluations."""
    return [*(monitor.name for monitor in config.rewards.monitors), *config.judged]


def describe_judge(judge: JudgeConfig) -> str:
    """A judge's name, its model as far as it is known, what it was asked, and what its answers were used for."""
    known = Path(judge.model).name if judge.model else judge.served_as or "the model of a running server"
    used = {"gate": "weighed each sample's loss", "reward": "its scores were trained on", "monitor": "measured only"}
    return f"{judge.name} ({known}, asked by {judge.template.kind}, {used[judge.role]})"
