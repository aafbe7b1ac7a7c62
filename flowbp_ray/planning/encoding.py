"""What the encoding of the prompts takes: how many there are, their bytes, and the time on the encoder's device."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning.costs import Costs
from flowbp_ray.planning.memory import WORKSPACE, Sizes, prompt_bytes
from flowbp_ray.prompts import drawn, read_prompts
from flowbp_ray.utils.units import format_bytes, format_seconds

CPU_FLOPS = 1e10
"""Operations per second of one CPU thread in a text encoder. T5-XXL in fp32 was timed at 1.1e10; fp16 is slower."""
GPU_FLOPS = 1e14
"""Operations per second of a GPU in a text encoder, one prompt at a time."""
LONGEST = 3600.0
"""Seconds that the encoding may take on CPUs, before `plan` refuses it."""
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
    data, held_out = config.data, config.evaluation
    draws = (config.seed, config.steps, data.prompts, data.prompts_per_step, held_out.prompts, held_out.limit)
    prompts, counted = costs.once(("prompts", *draws), lambda: count_prompts(config))
    tokens = max(tensor.shape[1] for tensor in costs.backbone.conditioning_skeleton().values() if tensor.dim() > 2)
    flops = 2 * tokens * sum(sizes.encoders.values())
    speed = GPU_FLOPS if config.encoder.gpus else CPU_FLOPS * config.encoder.threads
    return PromptEncoding(prompts, counted, prompt_bytes(costs), flops, prompts * flops / speed)


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
    return len({"", *(records[i].text for i in drawn(config, len(training), len(held_out)))}), True


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
    if plan.seconds <= LONGEST:
        return None
    enough = math.ceil(plan.seconds * config.encoder.threads / LONGEST)
    more = f" or encoder.threads={enough}" if enough <= MOST_THREADS else ""
    return (
        f"{parameters} would take about {format_seconds(plan.seconds)} for {plan.prompts:,} prompts on "
        f"{config.encoder.threads} CPU thread{'s' * (config.encoder.threads > 1)}: write encoder.gpus=1{more}"
    )
