"""The `rewards:` section: terms of the loss, monitors, and the processes that score."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from flowbp_ray.utils import addresses
from flowbp_ray.utils.settings import ElasticPoolConfig, Strict


class RewardConfig(Strict):
    """A reward, or a metric that is only measured. docs/rewards.md lists those that come with the package."""

    name: str
    """Name under which the scores are reported. It is also the kind where `kind` is null."""
    kind: str | None = None
    """Which reward: a name from docs/rewards.md, or `module:Class` for your own. null: the same as `name`."""
    options: dict[str, Any] = Field({})
    """Keyword arguments of the reward, such as the path of its weights. docs/rewards.md lists them for each kind."""

    @property
    def factory(self) -> str:
        """The name by which `rewards.build` finds it."""
        return self.kind or self.name


class TermConfig(RewardConfig):
    """One summand of the loss: weight · scale · relu(clip − score), the mean over the batch.

    With `gradient: none` it is weight times the loss of DiffusionNFT (see the section nft).
    """

    gradient: Literal["pixels", "none"] = "pixels"
    """pixels: the score is backpropagated to the image, and on through `method`. none: it need not have a gradient; the
    images of a prompt are compared by it, and what is better or worse is learned by DiffusionNFT. `kind: judge` is then
    the judge of that name, whose role is reward."""
    weight: float = 1.0
    """Factor of this term in the loss. With rewards.balance=grad_norm: its share of the gradient, relative to the
    other terms' weights. With gradient: none it must be above 0."""
    clip: float = 1.0
    """Score, in the reward's own unit, from which on an image is good enough and gives no gradient. Not used with
    gradient: none."""
    scale: float = 1.0
    """Second factor of this term, which brings the reward's unit to the size of the others. Not used with
    gradient: none, where the unit does not matter."""

    @property
    def judged(self) -> bool:
        """Whether a judge gives the scores."""
        return self.factory == "judge"

    @field_validator("gradient", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        """Take null for none: on the command line `none` is read as null, for all keys."""
        return "none" if value is None else value

    @model_validator(mode="after")
    def _used(self) -> TermConfig:
        if self.gradient == "pixels":
            if self.judged:
                raise ValueError(f"{self.name!r}: a judge's scores have no gradient; write gradient: none")
            return self
        if self.weight <= 0:
            raise ValueError(f"{self.name!r}: weight={self.weight:g} must be above 0 with gradient: none")
        fields = type(self).model_fields  # a resolved configuration has their defaults
        if unused := [name for name in ("clip", "scale") if getattr(self, name) != fields[name].default]:
            raise ValueError(f"{self.name!r}: {unused[0]} is not used with gradient: none; leave it out")
        return self


class JitterConfig(Strict):
    """Random changes of the images that the rewards see in training. Evaluations see the images as they are."""

    noise: float = Field(0.0, ge=0)
    """Largest standard deviation of Gaussian noise on the pixels (0 to 1); each image draws its own between 0 and
    this. 0: no noise."""
    shift: int = Field(0, ge=0)
    """Largest shift in pixels, in each direction; each image draws its own. 0: no shift."""


Precision = Literal["float32", "tf32", "bfloat16"]
SMALL = 256 * 256
"""Pixels of an image up to which all rows of an item are decoded at once, unless micro_batch says otherwise."""


class DecoderConfig(Strict):
    """How the decoder saves memory. Neither key changes what is computed."""

    checkpointing: bool = False
    """true: the decoder keeps the inputs of its parts only and computes them again in the backward pass: less memory
    for a quarter more work, and the same bits."""
    tile: int | None = Field(None, ge=1)
    """Rows of a feature map that are computed at a time, for images of 1024 pixels a side and above: 128, say. The
    whole map's statistics are used, so there are no seams, and values and gradients are equal up to rounding. null: all
    rows at once."""


class RewardsConfig(ElasticPoolConfig):
    """The reward servers: what is trained on, what is only measured, and the processes that compute it."""

    terms: list[TermConfig] = Field(min_length=1)
    """Rewards that are trained on; the loss is the sum of these terms. One without a gradient at the pixels says
    gradient: none."""
    monitors: list[RewardConfig] = Field([])
    """Rewards and metrics that are only measured, in evaluations. One without options may be its name alone."""
    balance: Literal["none", "grad_norm"] = "none"
    """none: the terms' gradients are added as they are. grad_norm: each term is multiplied by a factor that gives it
    the share of the gradient norm that its weight says, whatever its unit; this costs one backward pass through the
    decoder per term."""
    jitter: JitterConfig = JitterConfig()
    """Noise and shifts on the images that the rewards see in training."""
    micro_batch: int | None = Field(None, ge=1)
    """Images that are decoded and scored at a time, in training and in evaluations; fewer take less memory. null: one
    where an image has more than 256 × 256 pixels, else all rows of an item."""
    precision: Precision = "float32"
    """How the decoder and the rewards' models compute. float32: exactly. tf32: weights in float32, products of 10 bits
    on GPUs that have them, convolutions and matrices alike; the same as float32 elsewhere. bfloat16: weights in
    bfloat16, half the memory. A reward's own `options.dtype` goes before it."""
    decoder: DecoderConfig = DecoderConfig()
    """How the decoder saves memory."""
    offload: bool = False
    """true: the decoder and the rewards' models wait in host memory (pinned) between the calls that need them. Each
    call copies them to the GPU first; the scores are the same bits. For a GPU that other roles use in turns."""
    url: Annotated[list[str], Field(min_length=1)] | None = None
    """Address of a `flowbp-ray serve-reward`, or a list of them, which then score in place of this cluster: process i
    of the pool asks address i modulo their number. null: the rewards are computed by the pool itself."""
    token_file: str | None = Field(None, min_length=1)
    """File with the token of the servers at `url`. null: the environment variable FLOWBP_RAY_REWARD_TOKEN has it."""

    _url = field_validator("url", mode="before")(addresses.parse_urls)
    _token_file = field_validator("token_file")(addresses.absolute)

    @field_validator("balance", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        """Take null for none: on the command line `none` is read as null, for all keys."""
        return "none" if value is None else value

    @field_validator("monitors", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """Accept a monitor without options that is written as its name alone."""
        return [{"name": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value

    def at_once(self, rows: int, height: int, width: int) -> int:
        """How many of `rows` images of height × width pixels are decoded and scored at a time."""
        return min(rows, self.micro_batch or (rows if height * width <= SMALL else 1))

    @property
    def all(self) -> list[RewardConfig]:
        """All rewards that reward processes compute: terms but those of judges, then monitors."""
        return [*(term for term in self.terms if not term.judged), *self.monitors]

    @property
    def differentiable(self) -> list[TermConfig]:
        """The terms that are backpropagated."""
        return [term for term in self.terms if term.gradient == "pixels"]

    @property
    def scored(self) -> list[TermConfig]:
        """The terms without gradient."""
        return [term for term in self.terms if term.gradient == "none"]

    @model_validator(mode="after")
    def _distinct(self) -> RewardsConfig:
        names = [reward.name for reward in (*self.terms, *self.monitors)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{twice[0]} is named twice among terms and monitors; write it once")
        return self
