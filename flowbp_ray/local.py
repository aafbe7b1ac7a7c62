"""The parts of a run without Ray: builders of each role, and the same step in one process, for tests and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from flowbp_ray import prompts
from flowbp_ray.backbones.base import uint8_images
from flowbp_ray.backbones.embeddings import EMPTY, Embeddings, Encoded, build_encoder, distinct_texts, encode_all
from flowbp_ray.backbones.frozen import shared_base
from flowbp_ray.backbones.guidance import one_branch
from flowbp_ray.backbones.registry import build_backbone
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.control.selection import select
from flowbp_ray.learning.learner import build_learner
from flowbp_ray.messages import Item, ScoredItem, StepReport, Version, unpack
from flowbp_ray.rewards.remote import handshake
from flowbp_ray.rewards.scores import open_scorer
from flowbp_ray.rollout.items import build_items
from flowbp_ray.rollout.sampler import Sampler, build_sampler
from flowbp_ray.run.folder import Run
from flowbp_ray.utils import accelerator
from flowbp_ray.utils.digest import digest
from flowbp_ray.utils.text_files import check_unicode
from flowbp_ray.weights import trainable
from flowbp_ray.weights.packing import PackedTensors


def encode(config: RunConfig, texts: Sequence[str], ids: Sequence[int] | None = None) -> Embeddings:
    """Encode the empty prompt and those of `texts` that `ids` names (None: all) in this process.

    The text encoders are freed when it returns.
    """
    return encode_all(build_encoder(config), texts, ids)


def fill_cache(config: RunConfig, texts: Sequence[str], advance: Callable[[int, int], None] | None = None) -> Encoded:
    """Encode the empty prompt and `texts` into the cache; keep no embedding in memory.

    advance: called after each text with the number done and the total. Raises ValueError without a cache, or if the
    run encodes on a GPU and there is none here: a CPU's embeddings would differ.
    """
    if config.encoder.cache is None:
        raise ValueError("encoder.cache is null, so there is nothing to fill; write encoder.cache=auto, or a folder")
    if config.encoder.device != "cpu" and not accelerator.available():
        raise ValueError(
            f"encoder.gpus={config.encoder.gpus:g}, but there is no GPU here; write encoder.gpus=0, in the run as well"
        )
    encoder, wanted = build_encoder(config), distinct_texts(texts, range(len(texts)))
    for done, text in enumerate(wanted, 1):
        encoder(text)
        if advance is not None:
            advance(done, len(wanted))
    return encoder.report()


class LocalLoop:
    """Sampler, scorer and learner of a config (staleness 0, one rank, plain torch) in one process."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        records = prompts.training_prompts(config)
        self.texts, weights = [record.text for record in records], prompts.weights_of(records)
        embeddings = encode(config, self.texts, prompts.drawn(config, len(self.texts), 0, weights=weights))
        base = shared_base(config)
        self.sampler = build_sampler(config, embeddings, base)
        self.scorer = open_scorer(config, handshake.check(config))
        self.learner = build_learner(config, embeddings, base=base)
        self.source = build_items(config, len(self.texts), weights)

    def items(self, step: int) -> list[Item]:
        """The training items of a step, to be rolled out with the weights of version `step`."""
        return self.source.of_step(step, Version(0, step, self.config.nft.policy == "average"))

    def step(self, step: int) -> StepReport:
        """Run one optimizer step, with the same maths as the loop on Ray. Where nothing teaches, nothing changes."""
        config = self.config
        published = list(self.learner.publish(config.nft.policy == "average"))
        items = []
        for item in self.items(step):
            report, rollout, target = self.sampler.rollout(item, lambda: published)
            texts = [self.texts[i] for i in item.prompt_ids]
            scored, cotangent = self.scorer.score(item, texts, report, target)
            items.append(ScoredItem(item, report, scored, rollout, cotangent))
        rollouts, cotangents = [scored.rollout for scored in items], [scored.cotangent for scored in items]
        drift = self.learner.drift(rollouts) if config.drift.max is not None else ()
        chosen = select(items, drift, config.rewards, config.drift.max, config.nonfinite).beside(items, config)
        if not chosen.trains:
            return StepReport(step, 0, 0.0, 0.0, 0, 0, 0, 0.0)
        [optimality] = chosen.optimality(1, config)
        return self.learner.step(step, rollouts, cotangents, chosen.factors, chosen.shares, optimality)


def without_gpus(config: RunConfig) -> RunConfig:
    """Return the configuration with encoder, samplers and rewards on the CPU if this process sees no GPU.

    So a checkpoint that was trained on GPUs can be sampled on a machine without one.
    """
    if accelerator.available():
        return config
    pools = {"encoder": config.encoder, "samplers": config.samplers, "rewards": config.rewards}
    return config.model_copy(update={name: pool.model_copy(update={"gpus": 0.0}) for name, pool in pools.items()})


def draw(
    run: Run, texts: Sequence[str], step: int | None, guidance: float | None, seed: int
) -> tuple[int, list[np.ndarray]]:
    """Sample pictures [H, W, 3] uint8 of `texts` with a run's checkpoint; return its step and the pictures.

    Raises ValueError for a guidance below 1, or a text that is not Unicode.
    """
    used, _, pictures = draw_seeds(run, texts, step, guidance, [seed])
    return used, pictures[0]


def draw_seeds(
    run: Run, texts: Sequence[str], step: int | None, guidance: float | None, seeds: Sequence[int], negative: str = ""
) -> tuple[int, str, list[list[np.ndarray]]]:
    """Sample pictures [H, W, 3] uint8 of `texts` from the noise of each seed, with a run's checkpoint.

    step: None for the newest. guidance: None for the run's. negative: the text of the negative branch. Returns the
    checkpoint's step, the sha256 of its weights, and for each seed the pictures. Raises ValueError for a guidance below
    1, a negative text without a negative branch, or a text that is not Unicode.
    """
    if guidance is not None and not (math.isfinite(guidance) and guidance >= 1):
        raise ValueError(f"--guidance must be a finite number from 1 (no guidance), got {guidance:g}; write 1 or more")
    check_unicode(list(texts), "--prompt")
    check_unicode([negative], "--negative")
    config = without_gpus(run.config)
    guidance = config.backbone.guidance if guidance is None else guidance
    if negative and one_branch(build_backbone(config.backbone), guidance):
        why = f"{config.backbone.name} has no negative branch" if guidance > 1 else "guidance 1 has no negative branch"
        raise ValueError(f"--negative: {why}; leave it out" + ("" if guidance > 1 else ", or write --guidance 3"))
    used, tensors = run.checkpoints.weights(step, average=True)
    encoded = encode(config, [*texts, negative])
    embeddings = Embeddings({**encoded.prompts, EMPTY: encoded.prompts[len(texts)]})
    sampler = Sampler(
        config.backbone,
        lora=config.learners.lora,
        seed=config.seed,
        device=config.samplers.device,
        embeddings=embeddings,
    )
    trainable.install(sampler.transformer, tensors)
    sampler.version = Version(0, used)
    decoder, pictures = sampler.backbone.load_decoder(config.rewards.device), []
    for seed in seeds:
        item = Item(
            purpose="sample",
            step=0,
            index=0,
            prompt_ids=tuple(range(len(texts))),
            samples=tuple(range(len(texts))),
            plans=(),
            seed=seed,
            num_steps=config.backbone.num_steps,
            guidance=guidance,
            version=Version(0, used),
        )
        latents = sampler.sample(item, _no_fetch)
        with torch.no_grad():
            pictures.append(list(uint8_images(decoder(unpack(latents).to(config.rewards.device)))))
    return used, digest(tensors), pictures


def _no_fetch() -> list[PackedTensors]:
    raise RuntimeError("the sampler already holds the checkpoint's weights")
