"""The section `data`: which prompts a run trains on, how they are read and chosen, and how many images a step draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from flowbp_ray.utils.addresses import UserPath
from flowbp_ray.utils.settings import Strict
from flowbp_ray.utils.text_files import plain

HELD_OUT: Literal["data:heldout"] = "data:heldout"
"""What `evaluation.prompts` says for the prompts that `data.heldout` keeps from training."""


def _as_lists(value: Any) -> Any:
    """{column: value} as {column: [value]}, with numbers as texts: columns are compared as they are written."""
    if not isinstance(value, dict):
        return value
    lists = {column: found if isinstance(found, list) else [found] for column, found in value.items()}
    return {
        column: [str(v) if isinstance(v, int | float) and not isinstance(v, bool) else v for v in found]
        for column, found in lists.items()
    }


Name = Annotated[str, Field(min_length=1)]
Columns = Annotated[dict[Name, Name] | None, Field()]
"""Name here -> name of the file's column."""
Where = Annotated[dict[Name, Annotated[list[str], Field(min_length=1)]] | None, BeforeValidator(_as_lists)]
"""Column -> the values that are taken."""


class HeldOutConfig(Strict):
    """Prompts that are kept from training. Which they are depends on each prompt's text alone.

    So no prompt changes sides when others are added, and those that differ only in case and blanks are on one side.
    """

    fraction: float = Field(gt=0, lt=1)
    """About this share of the distinct prompts is held out."""
    seed: int = Field(0, ge=0)
    """Another number holds out others."""


class DataConfig(Strict):
    """The training prompts, and how many images a step draws."""

    prompts: UserPath
    """The training prompts: a file .txt (one per line), .jsonl, .json, .csv, .tsv, .parquet or .arrow (column
    `prompt`), those of text also as .gz; a pattern for several such as `data/train-*.parquet`; a folder of them, or one
    that `datasets` saved; a dataset of the Hub, `hf://datasets/OWNER/NAME` (docs/prompts.md); or `shapes:<split>` for
    those of the embedded world."""
    columns: Columns = None
    """Names here -> names of columns, where they differ: {prompt: caption}, and others such as {skill: category},
    which evaluations are reported by, or {claim: truth}. null: they do not differ."""
    split: str | None = Field(None, min_length=1)
    """Which split of a folder that has several: train, test. null: the only one."""
    where: Where = None
    """Column -> values: only prompts that have one of them are taken, such as {category: [Animals, People]}. null: all
    are taken."""
    weights: str | None = Field(None, min_length=1)
    """Column with a number for each prompt, and how often it is drawn is in proportion. 0: never. null: all are drawn
    equally often."""
    heldout: HeldOutConfig | None = None
    """Keeps a share of the prompts from training; `evaluation.prompts: data:heldout` evaluates on them. null: none."""
    prompts_per_step: int = Field(ge=1)
    """Prompts of one optimizer step. The batch has prompts_per_step × images_per_prompt images (rows)."""
    images_per_prompt: int = Field(1, ge=1)
    """Images that are drawn for each prompt of a step."""
    rollout_batch: int = Field(ge=1)
    """Rows of an item, which is what a sampler draws in one call. The batch is cut into items of this many rows and
    must be divisible by it."""
    rollout_micro_batch: int | None = Field(None, ge=1)
    """Rows of a training item that a sampler computes at a time; it must divide rollout_batch. null: all of them. With
    it items can be large, as the driver of a large cluster needs them, while samplers take no more memory. Results are
    those of items of this many rows, as long as rewards.micro_batch is set too, to a divisor of it."""

    @property
    def sampled_at_once(self) -> int:
        """Rows of a training item that a sampler computes at a time."""
        return self.rollout_micro_batch or self.rollout_batch

    @property
    def shape(self) -> BatchShape:
        return BatchShape(self.prompts_per_step, self.images_per_prompt, self.rollout_batch)


def check_held_out(data: DataConfig, prompts: str | None, columns: object, split: str | None) -> None:
    """Raises ValueError where an evaluation is of `data.heldout` and there is none, or its file is described twice.

    prompts, columns, split: those of the section `evaluation`.
    """
    if data.prompts == HELD_OUT:
        raise ValueError(f"data.prompts={HELD_OUT} is for evaluation.prompts alone; write a file, or shapes:train")
    if prompts is not None and prompts.startswith("data:") and "." not in prompts and prompts != HELD_OUT:
        raise ValueError(f"evaluation.prompts={plain(prompts)} is no share of data; did you mean {HELD_OUT}?")
    if prompts != HELD_OUT:
        return
    if data.heldout is None:
        raise ValueError(
            f"evaluation.prompts={HELD_OUT} needs data.heldout; write data.heldout={{fraction: 0.05}}, or a file"
        )
    for key, value in (("columns", columns), ("split", split)):
        if value is not None:
            raise ValueError(f"evaluation.{key} is for a file of its own, and evaluation.prompts={HELD_OUT} is read as "
                             f"data.prompts is; write evaluation.{key}=null")  # fmt: skip


def verified(data: DataConfig, prompts: str) -> list[str]:
    """The metrics that an evaluation of `prompts` adds where these state the truth, as those of the embedded world."""
    source = data.prompts if prompts == HELD_OUT else prompts
    return ["verifier", "quality", "colour_entropy_bits"] if source.startswith("shapes:") else []


@dataclass(frozen=True)
class BatchShape:
    """The sizes of a step: batch = prompts_per_step × images_per_prompt, cut into items of rollout_batch rows."""

    prompts_per_step: int
    images_per_prompt: int
    rollout_batch: int

    @property
    def batch(self) -> int:
        return self.prompts_per_step * self.images_per_prompt

    @property
    def items(self) -> int:
        return self.batch // self.rollout_batch
