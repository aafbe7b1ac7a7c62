"""What the encoding of the prompts takes: how many there are, their bytes, and the time on the encoder's device."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from flowbp_ray.backbones import Backbone
from flowbp_ray.backbones.embedding_cache import EmbeddingCache
from flowbp_ray.backbones.registry import build_backbone
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning.costs import Costs
from flowbp_ray.planning.memory import WORKSPACE, Sizes, elements, prompt_bytes
from flowbp_ray.prompts import drawn, evaluation_prompts, read_prompts, weights_of
from flowbp_ray.utils.files import cache_folder
from flowbp_ray.utils.units import format_bytes, format_seconds

CPU_FLOPS = 1e10
"""Operations per second of one CPU thread in a text encoder. T5-XXL in fp32 was timed at 1.1e10; fp16 is slower."""
GPU_FLOPS = 1e14
"""Operations per second of a GPU in a text encoder, one prompt at a time."""
MOST_THREADS = 256
"""Threads of a large host: a larger number is not suggested."""


@dataclass(frozen=True)
class PromptEncoding:
    """The encoding of all prompts that a run draws, the empty one among them, if the cache has none of them."""

    prompts: int
    """Number of distinct prompts; an upper bound where the prompt files are not on this machine."""
    counted: bool
    """Whether the files were read."""
    per_prompt: int
    """Bytes of one encoded prompt, the longest."""
    flops: int
    """Operations for one prompt: 2 per parameter and token."""
    seconds: float
    """Estimated time for all prompts where the configuration encodes them."""

    @property
    def nbytes(self) -> int:
        """Bytes of all embeddings."""
        return self.prompts * self.per_prompt


def prompt_encoding(config: RunConfig, costs: Costs, sizes: Sizes) -> PromptEncoding:
    """Plan the encoding of `config`."""
    read = {"prompts", "columns", "split", "where", "weights", "heldout", "prompts_per_step", "limit"}
    sources = [section.model_dump_json(include=read) for section in (config.data, config.evaluation)]
    draws = ("prompts", config.seed, config.steps, *sources)
    prompts, counted = costs.once(draws, lambda: count_prompts(config))
    flops = prompt_flops(costs.backbone, sum(sizes.encoders.values()))
    speed = GPU_FLOPS if config.encoder.gpus else CPU_FLOPS * config.encoder.threads
    return PromptEncoding(prompts, counted, prompt_bytes(costs), flops, prompts * flops / speed)


def prompt_flops(backbone: Backbone, parameters: int) -> int:
    """Operations for one prompt in text encoders of so many parameters."""
    tokens = max(tensor.shape[1] for tensor in backbone.conditioning_skeleton().values() if tensor.dim() > 2)
    return 2 * tokens * parameters


def count_prompts(config: RunConfig) -> tuple[int, bool]:
    """Number of distinct prompts that a run encodes, and whether their files are here; without them an upper bound.

    Evaluation prompts without a file and a limit are not counted.
    """
    try:
        training, held_out = read_prompts(config)
    except ValueError:
        held = (config.evaluation.limit or 0) if config.evaluation.prompts else 0
        return 1 + config.steps * config.data.prompts_per_step + held, False
    records = [*training, *held_out]
    ids = drawn(config, len(training), len(held_out), weights=weights_of(training))
    return len({"", *(records[i].text for i in ids)}), True


def refusal(config: RunConfig, plan: PromptEncoding, sizes: Sizes, smallest_gpu: int | None = None) -> str | None:
    """Why the prompts should not be encoded as configured, and what to write; None where they can be.

    smallest_gpu: bytes of the smallest GPU, where it is known.
    """
    parameters = f"text encoders of {sum(sizes.encoders.values()) / 1e9:.1f} B parameters"
    if config.encoder.gpus:
        needs = sizes.encoder_bytes + WORKSPACE
        if smallest_gpu is None or needs <= smallest_gpu * min(1.0, config.encoder.gpus):
            return None
        room = format_bytes(int(smallest_gpu * min(1.0, config.encoder.gpus)), "GiB")
        more = "encoder.gpus=1" if config.encoder.gpus < 1 and needs <= smallest_gpu else "encoder.gpus=0"
        return f"the {parameters} need {format_bytes(needs, 'GiB')} of {room}: write {more}"
    return _too_slow(config, parameters, plan.prompts, plan.seconds)


def check_time(config: RunConfig, texts: Collection[str]) -> None:
    """Raises ValueError where CPU threads would take longer than `encoder.longest` for those texts that are not cached.

    The text encoders' files are hashed only where all texts together would take too long.
    """
    if config.encoder.gpus or config.encoder.longest is None:
        return
    backbone, threads = build_backbone(config.backbone), config.encoder.threads
    parameters = sum(elements(encoder) for encoder in backbone.encoder_skeletons().values())
    each = prompt_flops(backbone, parameters) / (CPU_FLOPS * threads)
    if len(texts) * each <= config.encoder.longest:
        return
    root = cache_folder(config.encoder.cache)
    if root is not None:
        cache = EmbeddingCache(root, backbone, threads)
        texts = [text for text in texts if not cache.path(text).is_file()]
    who = f"text encoders of {parameters / 1e9:.1f} B parameters"
    if line := _too_slow(config, who, len(texts), len(texts) * each):
        raise ValueError(line)


def _too_slow(config: RunConfig, who: str, prompts: int, seconds: float) -> str | None:
    """Why so many seconds of encoding on CPU threads are refused, and what to write; None where they are not."""
    longest, threads = config.encoder.longest, config.encoder.threads
    if longest is None or seconds <= longest:
        return None
    enough = math.ceil(seconds * threads / longest)
    more = f" or encoder.threads={enough}" if enough <= MOST_THREADS else ""
    return (
        f"{who} would take about {format_seconds(seconds)} for {prompts:,} prompts on {threads} CPU "
        f"thread{'s' * (threads > 1)}: write encoder.gpus=1{more} (encoder.longest=null allows it)"
    )


def most_held(config: RunConfig, prompts: int) -> int:
    """The most prompts that are in Ray's object store at a time, of `prompts` that the run draws.

    Those of a window of steps (`encoder.ahead`) with an evaluation's, and the empty one. Without a cache a prompt that
    a later epoch draws again stays, so all count. Evaluation prompts without a file and a limit are not counted.
    """
    if config.encoder.cache is None:
        return prompts
    try:
        held_out = len(evaluation_prompts(config))
    except ValueError:
        held_out = config.evaluation.limit or 0
    steps = 1 + config.staleness + config.encoder.ahead
    return min(prompts, 1 + steps * config.data.prompts_per_step + held_out)
