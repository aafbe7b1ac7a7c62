"""The numbers of a step, computed once from what the processes reported. `catalog` says what each of them is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flowbp_ray.backbones.registry import build_backbone
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.config.sections import BackboneConfig
from flowbp_ray.control import optimality
from flowbp_ray.control.selection import Selection
from flowbp_ray.messages import RolloutReport, Scored, ScoredItem, StepReport
from flowbp_ray.rewards.balance import strengths
from flowbp_ray.surrogate import Plan


def step_metrics(
    items: Sequence[ScoredItem],
    learners: Sequence[StepReport],
    chosen: Selection,
    drift: Sequence[float],
    run: RunConfig,
) -> dict[str, float]:
    """Means over the batch, sums over the pools. Bytes are per image; seconds are per step.

    learners: empty where no sample was kept. loss is the reward's; base_penalty is what was added to it, and
    base_distance the root mean square of v_theta − v_base over the kept rows (see `penalty`). drift: per row, where it
    was measured before the step; else the learners' own. updated: 1 where the weights changed. grad_clipped: 1 where
    the norm was above the limit.
    """
    config, backbone = run.learners, run.backbone
    reports, scored = [item.report for item in items], [item.result for item in items]
    rows, limit = sum(len(r.omega) for r in reports), config.optimizer.max_grad_norm
    norm = learners[0].grad_norm if learners else float("nan")
    drifts = drift or [value for r in learners for value in r.drift]
    losses = np.array([loss for s in scored for loss in s.losses])
    flat: dict[str, float] = {"loss": float(losses @ np.array(chosen.factors) / rows)}
    for name in scored[0].scores:
        values = np.array([v for s in scored for row in s.scores[name] for v in row])
        flat[f"reward/{name}"] = float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
        if name in scored[0].clipped:
            flat[f"clipped/{name}"] = float(np.mean([s.clipped[name] for s in scored]))
    backpropagated = [term.name for term in run.rewards.differentiable]
    flat |= strengths(backpropagated, chosen.gram)
    flat |= {f"reward_share/{name}": share for name, share in zip(backpropagated, chosen.shares, strict=False)}
    flat |= _forward_process(learners, chosen, run)
    if drifts:
        flat |= {"drift": float(np.mean(drifts)), "drift_max": float(np.max(drifts))}
    distances, factors = np.array([value for r in learners for value in r.base_distance]), np.array(chosen.factors)
    if len(distances) and config.base_penalty is not None:
        square = float(distances[factors > 0] @ factors[factors > 0] / rows)
        flat |= {"base_penalty": config.base_penalty.weight * square, "base_distance": square**0.5}
    return flat | {
        "kept": chosen.kept / rows,
        "faults": float(len(chosen.faults) + sum(len(r.faults) for r in learners)),
        "updated": float(np.isfinite(norm)),
        "omega": float(np.mean([w for r in reports for w in r.omega])),
        "d_j": float(np.mean([d for r in reports for d, _ in r.residuals])),
        "d_0": float(np.mean([d for r in reports for _, d in r.residuals])),
        "grad_norm": norm,
        "grad_clipped": float(norm > limit),
        "learning_rate": learners[0].learning_rate if learners else 0.0,
        "forwards": sum(r.forwards for r in learners),
        "padding_rows": sum(r.padding for r in learners),
        **travel(reports, scored),
        "sampler_s": sum(r.seconds for r in reports),
        "load_s": sum(r.load_seconds for r in reports),
        "reward_s": sum(s.seconds for s in scored),
        "learner_s": max((r.seconds for r in learners), default=0.0),
        "state_bytes_per_image_formula": state_bytes(backbone, [plan for item in items for plan in item.item.plans]),
        "version": reports[0].version.step,
    }


def _forward_process(learners: Sequence[StepReport], chosen: Selection, run: RunConfig) -> dict[str, float]:
    """What terms without gradient did; nothing without any. Means are over the rows that were learned from."""
    compared = chosen.compared
    if compared is None:
        return {}
    found = {"nft_alike": compared.alike, "nft_unscored": compared.unscored}
    losses, squares, signal = (
        np.array([value for r in learners for value in getattr(r, name)])
        for name in ("forward_loss", "old_distance", "signal")
    )
    if not np.isfinite(losses).any():
        return found
    terms = run.rewards.scored
    names, weights = [term.name for term in terms], [term.weight for term in terms]
    found |= optimality.strengths(compared, names, weights, chosen.factors, signal.tolist())
    return found | {"nft_loss": float(np.nanmean(losses)), "old_distance": float(np.nanmean(squares)) ** 0.5}


def phases(began: float, scored: float, learned: float, ended: float, images: int) -> dict[str, float]:
    """Seconds of a step as the driver sees it, from four readings of a clock, and images per second."""
    whole = ended - began
    return {
        "wait_s": scored - began,
        "learn_s": learned - scored,
        "publish_s": ended - learned,
        "step_s": whole,
        "images_per_s": images / whole,
    }


def travel(reports: Sequence[RolloutReport], scored: Sequence[Scored]) -> dict[str, float]:
    """Bytes that travelled in a step, read off the messages.

    Per image, what goes with the items: the item (to the sampler, to the reward server, and in the rollout to the
    learner), states, the drift meter's velocities, the base's, targets, cotangents; `travel_bytes_per_image` is their
    sum. Per step, what does not grow with the images: weights that samplers loaded, and embeddings that reached them.
    """
    rows = sum(len(r.omega) for r in reports)
    per_image = {
        "item": sum(3 * r.item_bytes for r in reports) / rows,
        "state": sum(r.state_bytes for r in reports) / rows,
        "velocity": sum(r.velocity_bytes for r in reports) / rows,
        "base": sum(r.base_bytes for r in reports) / rows,
        "target": sum(r.target_bytes for r in reports) / rows,
        "forward": sum(r.forward_bytes for r in reports) / rows,
        "cotangent": sum(s.cotangent_bytes for s in scored) / rows,
    }
    per_image["travel"] = sum(per_image.values())
    return {f"{name}_bytes_per_image": value for name, value in per_image.items()} | {
        "weight_bytes": sum(r.weight_bytes for r in reports),
        "embedding_bytes": sum(r.embedding_bytes for r in reports),
    }


def state_bytes(model: BackboneConfig, plans: Sequence[Plan]) -> float:
    """Bytes of states per image by formula: states of the plan × elements of a latent × itemsize, averaged."""
    shape = build_backbone(model).latent_shape(model.height, model.width)
    of_plan = {id(plan): len(plan.states) for plan in {id(plan): plan for plan in plans}.values()}  # rows may share one
    states = sum(of_plan[id(plan)] for plan in plans) / len(plans)
    return states * int(np.prod(shape)) * model.torch_dtype.itemsize
