"""The loss over rewards and its gradient at the target: one decode, one backward through the decoder.

    L = mean over the GLOBAL batch of  omega * sum_m weight_m * scale_m * relu(clip_m - r_m)

The hinge is the map from reward to loss of ReFL's published code (arXiv 2304.05977); omega is LeapAlign's similarity
weight (arXiv 2604.15311), 1 for methods without one. dL/dtarget is what FlowBP (arXiv 2606.11075) sends back through
the surrogate trajectory.

A row with several branches (DRaFT-LV) counts the mean over them. What this file returns for a row depends on that row
and the size of the global batch, not on the other rows in the call, so micro-batches and reward servers may split the
batch as they like.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowbp_ray.rewards.base import Reward
from flowbp_ray.surrogate import append_dims

Decode = Callable[[Tensor], Tensor]  # latents [R, C, h, w] -> images [R, 3, H, W] in 0..1, differentiable
Jitter = Callable[[Tensor, list[tuple[int, int]]], Tensor]  # images [R, 3, H, W], (row, branch) of each -> images


@dataclass(frozen=True)
class RewardTerm:
    """One summand of the loss: weight * scale * relu(clip - r).

    `weight` is the user's share; `scale` brings rewards with different units to a common size; at `clip` and above the
    reward is satisfied and gives no gradient.
    """

    name: str
    weight: float = 1.0
    clip: float = 1.0
    scale: float = 1.0


@dataclass(frozen=True)
class Objective:
    """What one call learned about its rows.

    scores:    name -> [B, branches] fp32, as the rewards gave them
    losses:    [B] fp32; L is their sum over the whole batch divided by global_batch
    cotangent: dL/dtarget, fp32, shaped like target; [M, *target.shape], one per term, where `separate` was asked for
    clipped:   name -> share of scores at or above clip (these rows give that reward no gradient)
    gram:      [B, M, M] fp64, per row the products of the terms' gradients at the images (see `balance`)
    bad:       (row, "score" | "cotangent", reward or None) of what is not finite; the row's loss and cotangent are zero
    """

    scores: dict[str, Tensor]
    losses: Tensor
    cotangent: Tensor
    clipped: dict[str, float]
    gram: Tensor
    bad: tuple[tuple[int, str, str | None], ...] = ()


def score_and_cotangent(
    target: Tensor,
    decode: Decode,
    rewards: Sequence[tuple[RewardTerm, Reward]],
    prompts: Sequence[str],
    omega: Tensor,
    global_batch: int,
    micro_batch: int | None = None,
    jitter: Jitter | None = None,
    separate: bool = False,
    scored: Sequence[tuple[str, Reward]] = (),
) -> Objective:
    """Score target [B, branches, C, h, w] and return dL/dtarget, L being the loss of the module docstring.

    prompts: B texts. omega: [B], no gradient. micro_batch: decoded images held at once (None: all of them).
    jitter: see `flowbp_ray.rewards.jitter`; None scores the images as they are.
    separate: keep one cotangent per term, for whoever wants to balance them; costs one decoder backward per term.
    scored: rewards by name that only score, the images as they are; without others the cotangent is [B, 0].
    """
    if not rewards:
        return _only_scored(target, decode, prompts, scored, micro_batch)
    _check(target, rewards, prompts, omega, global_batch, micro_batch)
    batch, branches = target.shape[:2]
    where = [(row, branch) for row in range(batch) for branch in range(branches)]
    flat = target.detach().flatten(0, 1)
    factor = omega.detach().to(target.device, torch.float32).repeat_interleave(branches) / (global_batch * branches)
    step = micro_batch or len(where)
    parts = []
    for start in range(0, len(where), step):
        rows = slice(start, start + step)
        texts = [prompts[row] for row, _ in where[rows]]
        parts.append(_part(flat[rows], factor[rows], texts, where[rows], decode, rewards, jitter, separate, scored))
    scores = torch.cat([s[: len(rewards)] for s, _, _ in parts], dim=1)  # [M, B * branches]
    further = torch.cat([s[len(rewards) :] for s, _, _ in parts], dim=1)  # [scored, B * branches]
    cotangent = torch.cat([c for _, c, _ in parts], dim=1).unflatten(1, (batch, branches))  # [M or 1, B, branches, ...]
    gram = torch.cat([g for _, _, g in parts]).unflatten(0, (batch, branches)).sum(1)  # [B, M, M]
    gaps = torch.stack([t.weight * t.scale * torch.relu(t.clip - s) for (t, _), s in zip(rewards, scores, strict=True)])
    losses = (gaps.sum(0) * factor).unflatten(0, (batch, branches)).sum(1) * global_batch
    bad = _bad(rewards, scores, cotangent, where) + _bad_scores(scored, further, where)
    spoiled = torch.zeros(batch, dtype=torch.bool, device=cotangent.device)
    spoiled[[row for row, _, _ in bad]] = True
    losses = losses.masked_fill(spoiled, 0.0)
    cotangent = cotangent.masked_fill(append_dims(spoiled[None], cotangent.dim()), 0.0)
    return Objective(
        scores={
            name: s.unflatten(0, (batch, branches))
            for name, s in zip(
                [*(t.name for t, _ in rewards), *(n for n, _ in scored)], [*scores, *further], strict=True
            )
        },
        losses=losses,
        cotangent=cotangent if separate else cotangent[0],
        clipped={t.name: (s >= t.clip).float().mean().item() for (t, _), s in zip(rewards, scores, strict=True)},
        gram=gram.masked_fill(spoiled.view(-1, 1, 1), 0.0),
        bad=bad,
    )


def _part(
    latents: Tensor,  # [R, C, h, w]
    factor: Tensor,  # [R]: omega / (global_batch * branches)
    texts: list[str],
    where: list[tuple[int, int]],
    decode: Decode,
    rewards: Sequence[tuple[RewardTerm, Reward]],
    jitter: Jitter | None,
    separate: bool,
    scored: Sequence[tuple[str, Reward]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [M + scored, R], cotangents [M or 1, R, C, h, w] and products of image gradients [R, M, M] of a few rows.

    The chain is cut at the images that the rewards see: each reward's graph is freed before the next is built, and
    the decoder is walked back once with the sum.
    """
    latents = latents.clone().requires_grad_(True)
    with torch.enable_grad():
        images = decode(latents)
        plain = images.detach()
        if jitter is not None:
            images = jitter(images, where)
        seen = images.detach().requires_grad_(True)
        scores, gradients = [], []
        for term, reward in rewards:
            score = _scored(term.name, reward, seen, texts)
            loss = (factor * term.weight * term.scale * torch.relu(term.clip - score)).sum()
            scores.append(score.detach())
            gradients.append(torch.autograd.grad(loss, seen)[0])
        at_images = gradients if separate else [torch.stack(gradients).sum(0)]
        cotangents = [
            torch.autograd.grad(images, latents, cotangent.to(images.dtype), retain_graph=i + 1 < len(at_images))[0]
            for i, cotangent in enumerate(at_images)
        ]
    with torch.no_grad():
        scores += [_called(name, reward, plain, texts) for name, reward in scored]
    flat = torch.stack(gradients, dim=1).flatten(2).double()  # [R, M, 3 H W]
    return torch.stack(scores), torch.stack(cotangents).float(), flat @ flat.transpose(1, 2)


def _only_scored(
    target: Tensor,
    decode: Decode,
    prompts: Sequence[str],
    scored: Sequence[tuple[str, Reward]],
    micro_batch: int | None,
) -> Objective:
    """Scores alone, of target [B, 1, C, h, w]."""
    flat, batch = target.detach().flatten(0, 1), len(target)
    parts: list[list[Tensor]] = []
    with torch.no_grad():
        for start in range(0, len(flat), micro_batch or len(flat)):
            rows = slice(start, start + (micro_batch or len(flat)))
            images = decode(flat[rows])
            parts.append([_called(n, reward, images, list(prompts[rows])) for n, reward in scored])
    scores = (
        torch.stack([torch.cat(column) for column in zip(*parts, strict=True)]) if scored else flat.new_zeros(0, batch)
    )
    return Objective(
        scores={name: s.unsqueeze(1) for (name, _), s in zip(scored, scores, strict=True)},
        losses=torch.zeros(batch),
        cotangent=torch.zeros(batch, 0),
        clipped={},
        gram=torch.zeros(batch, 0, 0),
        bad=_bad_scores(scored, scores, [(row, 0) for row in range(batch)]),
    )


def _scored(name: str, reward: Reward, images: Tensor, texts: list[str]) -> Tensor:
    """Scores [R] fp32 with a gradient. Raises ValueError, with the reward's name, for what cannot be trained on."""
    score = _called(name, reward, images, texts)
    if not score.requires_grad:
        raise ValueError(f"reward {name!r} has no gradient in the images; write gradient: none in its term")
    return score


def _called(name: str, reward: Reward, images: Tensor, texts: list[str]) -> Tensor:
    """Scores [R] fp32. Raises RuntimeError, with the reward's name, where the reward raises."""
    try:
        score = reward.score(images, texts).float()
    except ValueError:
        raise
    except Exception as error:
        raise RuntimeError(f"reward {name!r} failed: {type(error).__name__}: {error}") from error
    if score.shape != (len(texts),):
        raise ValueError(f"reward {name!r} must return one score per image, got {tuple(score.shape)}")
    return score


def _check(
    target: Tensor,
    rewards: Sequence[tuple[RewardTerm, Reward]],
    prompts: Sequence[str],
    omega: Tensor,
    global_batch: int,
    micro_batch: int | None,
) -> None:
    """Refuse what cannot be meant, naming what to pass instead."""
    if target.ndim < 3:
        raise ValueError(f"target must be [rows, branches, ...], got shape {tuple(target.shape)}; add a branch axis")
    names = [term.name for term, _ in rewards]
    if len(set(names)) != len(names):
        raise ValueError(f"reward names must differ, got {names}; give one of them another name")
    if len(prompts) != len(target):
        raise ValueError(f"{len(target)} rows need {len(target)} prompts, got {len(prompts)}")
    if omega.shape != (len(target),):
        raise ValueError(f"omega must be [{len(target)}], one factor per row, got {tuple(omega.shape)}")
    if global_batch < len(target):
        raise ValueError(f"global_batch counts the rows of all servers: at least {len(target)}, got {global_batch}")
    if micro_batch is not None and micro_batch < 1:
        raise ValueError(f"micro_batch must be at least 1 (or None for all rows), got {micro_batch}")


def _bad(
    rewards: Sequence[tuple[RewardTerm, Reward]],
    scores: Tensor,  # [M, R]
    cotangent: Tensor,  # [M or 1, B, branches, ...]
    where: list[tuple[int, int]],
) -> tuple[tuple[int, str, str | None], ...]:
    """Rows that are not finite, with the reward where it is known. A failed score is never a zero: it has a name."""
    found: dict[tuple[int, str, str | None], None] = {}
    for (term, _), score in zip(rewards, scores, strict=True):
        for i in (~torch.isfinite(score)).nonzero().flatten().tolist():
            found[where[i][0], "score", term.name] = None
    rows = {row for row, _, _ in found}
    for m, part in enumerate(cotangent):
        name = rewards[m][0].name if len(cotangent) > 1 else None
        for row in (~torch.isfinite(part)).flatten(1).any(1).nonzero().flatten().tolist():
            if row not in rows:  # a bad score has a bad gradient; once is enough
                found[row, "cotangent", name] = None
    return tuple(found)


def _bad_scores(
    scored: Sequence[tuple[str, Reward]], scores: Tensor, where: list[tuple[int, int]]
) -> tuple[tuple[int, str, str | None], ...]:
    """As `_bad`, for rewards that only score: scores [scored, R]."""
    return tuple(
        (where[i][0], "score", name)
        for (name, _), score in zip(scored, scores, strict=True)
        for i in (~torch.isfinite(score)).nonzero().flatten().tolist()
    )
