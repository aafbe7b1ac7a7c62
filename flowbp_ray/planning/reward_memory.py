"""The memory of a reward server: the decoder, the rewards' models, and what scoring a few images keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flowbp_ray.backbones.decoding import Decoding
from flowbp_ray.config.rewards import RewardConfig
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning.costs import Costs
from flowbp_ray.planning.memory import FP32, Role, Share, Sizes, decoded_at_once, evaluated_at_once, role
from flowbp_ray.rewards import base
from flowbp_ray.rewards.precision import with_dtype
from flowbp_ray.rewards.skeleton import Skeleton, skeleton


def rewards(config: RunConfig, costs: Costs, sizes: Sizes) -> Role:
    """One process of the pool. With `rewards.url` all of this is on another cluster, and nothing is held here.

    In training the decoder's graph waits while one reward after the other builds its own, which is gone before the
    next; then the decoder is walked back, and terms without gradient see the images. Where there are no others, and in
    evaluations, images are decoded without a graph, then seen by one reward after the other.
    A reward that does not state its model (`flowbp_ray.rewards.skeleton`) is not counted.
    """
    if config.rewards.url:
        return role("reward servers", config.rewards, [])
    how, model = Decoding.of(config.rewards), config.backbone
    shares = [Share("decoder weights (VAE)", sizes.vae * how.dtype.itemsize)]
    for reward in config.rewards.all:
        found = stated(config, reward, costs)
        shares.append(Share(f"{reward.name} weights", found.nbytes if found else 0))
    image = 3 * model.height * model.width * FP32
    rows, terms = decoded_at_once(config), config.rewards.differentiable
    scored = [term for term in config.rewards.scored if not term.judged]
    if terms:
        decoded = costs.decoding(rows, True, how)
        largest = max(_largest(config, costs, terms, rows, True), _largest(config, costs, scored, rows, False))
        seen = rows * image * (2 + len(terms)) + largest  # a copy, and a gradient each
        back = decoded.peak - decoded.saved
        shares += [
            Share("decoder activations", decoded.saved, "scoring"),
            Share("rewards' activations" if seen > back else "decoder's backward", max(seen, back), "scoring"),
        ]
    else:
        shares.append(_without_graph(config, costs, scored, rows, "scoring"))
    if config.evaluation.prompts:
        rows = config.rewards.at_once(evaluated_at_once(config), model.height, model.width)
        shares.append(_without_graph(config, costs, config.rewards.all, rows, "evaluation"))
    return role("reward servers", config.rewards, offloaded(shares) if config.rewards.offload else shares)


def _without_graph(config: RunConfig, costs: Costs, seeing: Sequence[RewardConfig], rows: int, phase: str) -> Share:
    """The larger of decoding `rows` images and of the rewards that then see them, none of which is walked back."""
    image = 3 * config.backbone.height * config.backbone.width * FP32
    seen = rows * image + _largest(config, costs, seeing, rows, False)
    peak = costs.decoding(rows, False, Decoding.of(config.rewards)).peak
    return Share("rewards' activations" if seen > peak else "decoder activations", max(seen, peak), phase)


def offloaded(shares: Sequence[Share]) -> list[Share]:
    """The shares with `rewards.offload`: what is always held is on the host, and on the device while it is used."""
    fixed, phases = [s for s in shares if not s.phase], dict.fromkeys(s.phase for s in shares if s.phase)
    there = [replace(share, phase=phase) for share in fixed for phase in phases]
    return [*(replace(share, place="host") for share in fixed), *there, *(s for s in shares if s.phase)]


def stated(config: RunConfig, reward: RewardConfig, costs: Costs) -> Skeleton | None:
    """A reward's model without weights, in the precision that it would have; None where it does not state one.

    Nor does one that cannot be imported here, which may be installed where the run will be.
    """

    def make() -> Skeleton | None:
        try:
            factory = base.factory(reward.factory)
        except ValueError:
            return None
        return skeleton(reward.factory, with_dtype(factory, reward.options, config.rewards.precision))

    return costs.once(_key("reward", config, reward), make)  # kept by `Untraced` too


def unstated(config: RunConfig, costs: Costs) -> list[str]:
    """Names of the rewards whose models are not counted."""
    here = [] if config.rewards.url else config.rewards.all
    return [reward.name for reward in here if stated(config, reward, costs) is None]


def _largest(config: RunConfig, costs: Costs, seeing: Sequence[RewardConfig], rows: int, differentiate: bool) -> int:
    """The most bytes that one of these rewards needs to score `rows` images, with its backward where asked."""
    peaks = [0]
    for reward in seeing:
        found = stated(config, reward, costs)
        if found is not None:
            peaks.append(costs.seeing(_key("seeing", config, reward), found, rows, differentiate))
    return max(peaks)


def _key(what: str, config: RunConfig, reward: RewardConfig) -> tuple[str, ...]:
    return what, reward.factory, str(reward.options), config.rewards.precision
