"""Checks before an actor starts: prompts, rewards, judges, the model's folder, adapters, the cache."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flowbp_ray.backbones.finite import check_finite, remember_in
from flowbp_ray.backbones.guidance import distilled_guidance
from flowbp_ray.backbones.kernels import check_attention
from flowbp_ray.backbones.quantised import check_library
from flowbp_ray.backbones.registry import build_backbone
from flowbp_ray.backbones.stored import check_stored
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.config.sections import TrackingConfig
from flowbp_ray.judges import preflight as judges
from flowbp_ray.learning.optim import check_moments
from flowbp_ray.planning.encoding import check_time
from flowbp_ray.prompts import Needs, PromptRecord, drawn, read_prompts, weights_of
from flowbp_ray.rewards.base import factory
from flowbp_ray.rewards.remote import handshake
from flowbp_ray.rewards.remote.identity import content, identity
from flowbp_ray.rewards.scorer import check_rewards
from flowbp_ray.run.environment import versions
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.errors import need_package
from flowbp_ray.utils.files import cache_folder
from flowbp_ray.utils.secrets import check_no_secrets
from flowbp_ray.weights import trainable

PROGRAM = ("flowbp_ray", "actors")
"""The packages whose code draws and scores."""


@dataclass(frozen=True)
class Checked:
    """The result of `check`: the prompts, a line on what is trained, and `agreed`, the result of `handshake.check`."""

    training: list[PromptRecord]
    held_out: list[PromptRecord]
    trains: str
    agreed: dict[str, str]
    about: tuple[str, ...] = ()
    """Lines on the prompts: how many there are, and one for each tokenizer that cuts some of them off."""
    parameters: int = 0
    """Number of parameters that are trained."""
    base: str | None = None
    """What the evaluation before the first step depends on (`base_identity`), where such evaluations are kept."""

    @property
    def texts(self) -> list[str]:
        """All prompts in the order of their ids: the training prompts, then the evaluation prompts."""
        return [record.text for record in (*self.training, *self.held_out)]

    def needs(self, run: Run) -> Needs:
        """The prompts that `run` draws from its newest checkpoint on."""
        first = max(run.checkpoints.steps(), default=0)
        return Needs(run.config, len(self.training), len(self.held_out), first, weights_of(self.training))


def check(config: RunConfig) -> Checked:
    """Read everything that the configuration names, and check that the weights are finite.

    Raises ValueError for a mistake of the user.
    """
    check_no_secrets(config.model_dump(mode="json"))
    model, lora = config.backbone, config.learners.lora
    backbone = build_backbone(model)
    backbone.latent_shape(model.height, model.width)
    backbone.sigmas(model.num_steps, model.height, model.width)
    check_library(model.quantization)
    check_attention(model.attention)
    prepared = trainable.prepare(backbone.skeleton(), lora, config.seed, backbone.lora_targets)
    check_moments(config.learners.optimizer)
    check_trackers(config.tracking)
    train, held_out = read_prompts(config)
    about = tuple(about_prompts(config, train, held_out))
    check_time(config, _to_encode(config, train, held_out))
    agreed = handshake.check(config)
    cache = cache_folder(config.encoder.cache)
    remember_in(None if cache is None else cache / "files")
    if not config.rewards.url:  # remote servers have checked their own rewards
        check_deterministic(config)
        check_rewards(config.rewards, [record.text for record in held_out], [record.text for record in train])
    judges.check(config.judges)
    for part in backbone.encoder_parts():
        if not part.is_dir():
            raise ValueError(f"{part.parent} has no {part.name}: the folder {part.name}/ is missing; download it too")
    for name, skeleton in backbone.part_skeletons().items():
        check_stored(backbone.base_folder / name, skeleton)
        check_finite(backbone.base_folder / name)
    held = distilled_guidance(config)
    toward = "" if held is None else f"; distilling guidance {held:g} of the base, beside what the rewards ask for"
    count = sum(p.numel() for p in trainable.trained(prepared).values())
    base = base_identity(config, held_out, agreed) if config.evaluation.base_cache and held_out else None
    return Checked(train, held_out, trainable.describe(prepared, lora) + toward, agreed, about, count, base)


def base_identity(config: RunConfig, held_out: Sequence[PromptRecord], agreed: Mapping[str, str]) -> str:
    """16 hex digits over everything that the evaluation before the first step depends on, files by their content.

    That is the model, its adapters, the prompts, the noise, the rewards, their servers, the code, and how it is
    computed. The method, the training prompts and the optimizer are no part of it, nor is the kind of the machines:
    runs that share an evaluation must be on alike ones.
    """
    model, rewards, lora = config.backbone, config.rewards, config.learners.lora
    cache = cache_folder(config.encoder.cache)
    memory = None if cache is None else cache / "files"
    scored, pools = identity(config), ("encoder", "samplers", "rewards")
    own = {reward.factory for reward in rewards.all if ":" in reward.factory}
    stated = {
        "model": model.model_dump(mode="json", exclude={"path", "guidance", "detach_negative"}),
        "files": content(build_backbone(model).base_folder, memory),
        "adapters": None if lora is None else [lora.model_dump(mode="json"), config.seed],
        "prompts": [[record.text, record.extra] for record in held_out],
        "evaluation": config.evaluation.model_dump(mode="json", include={"batch", "seed", "num_steps"}),
        "rewards": {name: [plain["kind"], plain["options"]] for name, plain in scored["rewards"].items()},
        "decoder and servers": [scored["decoder"], sorted(agreed.values())],
        "scoring": rewards.model_dump(mode="json", include={"precision", "micro_batch", "decoder"}),
        "own code": {name: _source(factory(name)) for name in sorted(own)},
        "threads": {name: getattr(config, name).threads for name in pools},
        "gpus": {name: getattr(config, name).gpus > 0 for name in pools},
        "shared base": config.cluster.share_base and config.learners.threads,
        "deterministic": config.cluster.deterministic,
        "code": [content(folder, None) for name in PROGRAM for folder in _folders(name)],
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(stated, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _folders(package: str) -> list[Path]:
    """Where a package is, which is not imported for it: the actors' stands above this module."""
    spec = find_spec(package)
    return [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []


def _source(made: Callable[..., Any]) -> str:
    """sha256 of the file that a reward of one's own is in; its name where there is none."""
    try:
        return content(Path(inspect.getfile(made)), None)
    except (OSError, TypeError):
        return repr(made)


def check_trackers(tracking: TrackingConfig) -> None:
    """Raise ValueError where a tracker that is turned on is not installed."""
    for name in ("tensorboard", "mlflow"):
        if getattr(tracking, name):
            need_package(f"tracking.{name}", name, name)


def drawn_texts(config: RunConfig, train: list[PromptRecord], held_out: list[PromptRecord]) -> list[str]:
    """The prompts that a run draws from its start on, in the order in which it needs them."""
    records = [*train, *held_out]
    return [records[i].text for i in drawn(config, len(train), len(held_out), weights=weights_of(train))]


def about_prompts(config: RunConfig, train: list[PromptRecord], held_out: list[PromptRecord]) -> list[str]:
    """A line on the prompts, and one for each tokenizer that cuts some of those off that the run draws.

    Raises ValueError for a prompt that cannot be encoded.
    """
    texts = drawn_texts(config, train, held_out)
    cut = build_backbone(config.backbone).read_texts(texts)
    return [describe_prompts(config, train, held_out, len(set(texts)), bool(cut)), *cut]


def describe_prompts(
    config: RunConfig, train: list[PromptRecord], held_out: list[PromptRecord], drawn: int, cut: bool
) -> str:
    """A line on the prompts: how many, how many are there twice, the longest, and whether those drawn are cut off.

    drawn: number of distinct prompts that the run draws. cut: whether a text encoder cuts some of them off.
    """
    counts = Counter(record.text for record in train)
    longest = max((record.text for record in train), key=len)
    again = len(train) - len(counts)
    line = f"prompts: {len(train):,} of {config.data.prompts}" + f", {again:,} of them again" * bool(again)
    line += f", {len(longest):,} characters at most"
    if weights := weights_of(train):
        line += f", drawn by {config.data.weights} from {min(weights):g} to {max(weights):g}"
    if held_out:
        both = sum(record.text in counts for record in held_out)
        line += f"; {len(held_out):,} to evaluate on" + f", {both:,} of which are trained on too" * bool(both)
    return line + f"; the run draws {drawn:,}" + ", and none is cut off" * (not cut)


def _to_encode(config: RunConfig, train: list[PromptRecord], held_out: list[PromptRecord]) -> set[str]:
    """The texts that the run needs from its newest checkpoint on, the empty one among them."""
    saved = Run(config.run_dir).checkpoints.steps() if config.resume == "auto" else []
    ids = drawn(config, len(train), len(held_out), max(saved, default=0), weights=weights_of(train))
    records = [*train, *held_out]
    return {"", *(records[i].text for i in ids)}


def check_deterministic(config: RunConfig) -> None:
    """Raise ValueError where a reward's gradient on a GPU has no deterministic kernels, and the run asks for them."""
    if not (config.cluster.deterministic and config.rewards.gpus):
        return
    for term in config.rewards.terms:
        if term.gradient != "none" and not getattr(factory(term.factory), "deterministic", True):
            raise ValueError(
                f"cluster.deterministic: the reward {term.name!r} has no deterministic gradient on a GPU; write "
                "rewards.gpus=0 or cluster.deterministic=false"
            )
