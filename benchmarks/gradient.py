"""python -m benchmarks.gradient: how near each method's gradient is to full backpropagation, and at what cost.

On stored trajectories (some prompts, one noise each) the reward's gradient is backpropagated through all N sampling
steps, one at a time: λ[i] = λ[i+1] + h[i]·(dv/dx)ᵀλ[i+1], so memory is that of one forward, whatever the model. Beside
it, for each design, many draws of its surrogate on the same trajectories: the cosine of its expected gradient with the
full one, the ratio of their norms (in which LeapAlign's and FlowBP-Lagrange's weights of samples count), the cosine and
the spread of a single draw, and its forwards. The second half is how far a connector's end is from the cached state, by
the length of the leap and the order of the quadrature.

Any configuration will do, so a model on a GPU too:
`python -m benchmarks.gradient sd35_flowbp_sparse samplers.gpus=1 --rows 2`. Prints JSON; --table prints Markdown of
such a file, and --plot draws it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measured import ALONE
from flowbp_ray.backbones.guidance import full_velocity, trained_velocity
from flowbp_ray.config import loading
from flowbp_ray.config.method import build_method
from flowbp_ray.local import LocalLoop
from flowbp_ray.rewards.objective import score_and_cotangent
from flowbp_ray.rollout.items import noise_of, plans_of_step
from flowbp_ray.surrogate import Cache, Plan, gather_states, gather_targets, omega, renoise, sweep
from flowbp_ray.surrogate.quadrature import lagrange, spread
from flowbp_ray.surrogate.trajectory import Velocity, rollout
from flowbp_ray.utils import random

SEVEN = ("refl", "draft_lv", "drtune", "leapalign", "flowbp_sparse", "flowbp_bridge", "flowbp_lagrange")
SPARSE = [(k, bias) for k in (1, 2, 4, 8) for bias in (0.0, 1.0, 4.0)]
ORDERS = (1, 2, 3, 4, 5)


def designs() -> dict[str, dict[str, Any]]:
    """Name -> method as in YAML: the seven as published, then points around FlowBP-Sparse."""
    found: dict[str, dict[str, Any]] = {name: {"name": name} for name in SEVEN}
    found |= {f"{name}, per sample": {"name": name, "draws": "per_sample"} for name in SEVEN[2:]}
    for k, bias in SPARSE:
        found[f"sparse K={k} bias={bias:g}, per sample"] = {
            "name": "flowbp_sparse",
            "k": k,
            "late_bias": bias,
            "rescale": 1.0,
            "draws": "per_sample",
        }
    return found | {"all nodes": {"name": "flowbp_sparse", "k": 10_000, "late_bias": 0.0, "rescale": 0.0}}


@dataclass
class Problem:
    """Stored trajectories of a model, and what its reward says of latents.

    learned: the velocity that a learner differentiates; whole: the guided one. cotangent: targets [B, branches, …] and
    weights [B] -> dL/dtarget.
    """

    cache: Cache
    learned: Velocity
    whole: Velocity
    parameters: list[nn.Parameter]
    cotangent: Callable[[Tensor, Tensor], Tensor]
    seed: int

    @property
    def rows(self) -> int:
        return int(self.cache.x.shape[1])

    def gradient(self) -> Tensor:
        """The parameters' gradient [P] fp32, which is then set back."""
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([g.detach().float().flatten() for g in found])
        for p in self.parameters:
            p.grad = None
        return flat


def prepare(name: str, rows: int, overrides: Sequence[str]) -> Problem:
    """Build the model and the rewards of a configuration, and roll out `rows` of its training prompts."""
    config = loading.load(name, [*ALONE, "rewards.jitter={noise: 0.0, shift: 0}", *overrides])
    loop = LocalLoop(config)
    sampler, scorer, model = loop.sampler, loop.scorer, config.backbone
    trained = [p for p in sampler.transformer.parameters() if p.requires_grad]
    ids = [prompt for item in loop.items(0) for prompt in item.prompt_ids][:rows]
    item = replace(loop.items(0)[0], prompt_ids=tuple(ids), samples=tuple(range(len(ids))), plans=(), times=())
    assert sampler.embeddings is not None
    sigmas = sampler.backbone.sigmas(item.num_steps, model.height, model.width)
    inputs = (sampler.backbone, sampler.transformer, sigmas, sampler.embeddings.rows(ids))
    whole = full_velocity(*inputs, sampler.embeddings.negative(len(ids)), item.guidance)
    learned = trained_velocity(*inputs, sampler.embeddings.negative(len(ids)), item.guidance, model.detach_negative)
    noise = noise_of(item, sampler.latent_shape).to(sampler.device, model.torch_dtype)
    texts = [loop.texts[i] for i in ids]

    def cotangent(target: Tensor, weights: Tensor) -> Tensor:
        shown = target.to(config.rewards.device)
        found = score_and_cotangent(shown, scorer.decode, scorer.trained, texts, weights, len(ids), 4)  # type: ignore
        return found.cotangent.to(noise.device)

    return Problem(rollout(whole, noise, sigmas), learned, whole, trained, cotangent, config.plan_seed)


def full(problem: Problem) -> Tensor:
    """The gradient [P] through all steps, a step at a time."""
    cache, row = problem.cache, torch.arange(problem.rows, device=problem.cache.x.device)
    u = problem.cotangent(cache.x[-1][:, None].float(), torch.ones(problem.rows))[:, 0]
    h = (cache.sigmas[1:] - cache.sigmas[:-1]).tolist()
    for i in reversed(range(len(h))):
        x = cache.x[i].detach().requires_grad_()
        v = problem.whole(x, torch.full_like(row, i), row)
        (h[i] * v.float() * u).sum().backward()
        assert x.grad is not None
        u = u + x.grad.float()
    return problem.gradient()


def surrogate(problem: Problem, plans: Sequence[Plan], step: int) -> tuple[Tensor, int]:
    """The gradient [P] of one draw, and the rows of its forwards."""
    cache = problem.cache
    if fresh := plans[0].renoised:
        shape = (fresh, *cache.x.shape[2:])
        eps = random.normal(shape, problem.seed, "renoise", step, range(problem.rows)).transpose(0, 1)
        y = renoise(cache, eps.to(cache.x.device, cache.x.dtype))
        row = torch.arange(problem.rows, device=y.device)
        node = torch.full_like(row, len(cache.sigmas) - 2)
        with torch.no_grad():
            cache = replace(cache, y=y, v_y=torch.stack([problem.whole(state, node, row) for state in y]))
    u = problem.cotangent(gather_targets(plans, cache), omega(plans, cache).cpu())
    report = sweep(problem.learned, plans, gather_states(plans, cache), u, micro_batch=problem.rows)
    return problem.gradient(), report.rows


def measure(problem: Problem, truth: Tensor, spec: dict[str, Any], draws: int) -> dict[str, float]:
    """What `draws` draws of a design say of its gradient's expectation and of one draw."""
    method = build_method({**spec, "k": min(spec["k"], len(problem.cache.v))} if "k" in spec else spec)
    mean, squares, cosines, rows, seconds = torch.zeros_like(truth), 0.0, 0.0, 0, 0.0
    for draw in range(draws):
        plans = plans_of_step(method, problem.cache.sigmas, problem.seed, draw, problem.rows)
        began = time.thread_time()
        found, count = surrogate(problem, plans, draw)
        seconds += time.thread_time() - began
        mean += found / draws
        squares += found.square().sum().item() / draws
        cosines += cosine(found, truth) / draws
        rows += count
    spread_of_mean = max(0.0, (squares - mean.square().sum().item()) / max(1, draws - 1))
    # of the expectation, without the draws' noise
    norm = max(1e-30, mean.square().sum().item() - spread_of_mean) ** 0.5
    return {
        "cosine": float(mean @ truth) / (norm * float(truth.norm())),
        "norm_ratio": norm / float(truth.norm()),
        "cosine_of_a_draw": cosines,
        "spread": max(0.0, spread_of_mean * draws) ** 0.5 / norm,
        "forwards": rows / draws / problem.rows,
        "cpu_s": seconds / draws,
        "draws": draws,
    }


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()).clamp_min(1e-30))


def connectors(cache: Cache) -> Iterator[dict[str, float]]:
    """Mean |x̂ − x| at the end of leaps, by order and by length in nodes: mean over all leaps of it, and over rows."""
    grid, nodes = cache.sigmas.tolist(), len(cache.sigmas)
    for order in ORDERS:
        for length in range(1, nodes):
            found = []
            for start in range(nodes - length):
                supports = spread(start, start + length, order)
                weights = lagrange([grid[i] for i in supports], grid[start], grid[start + length])
                end = cache.x[start].float()
                for node, weight in zip(supports, weights, strict=True):
                    end = end + weight * cache.v[node].float()
                found.append((end - cache.x[start + length].float()).abs().mean().item())
            yield {"order": order, "length": length, "distance": sum(found) / len(found)}


def table(found: dict[str, Any]) -> str:
    """A row per design, by the cosine of a single draw."""
    names = ("design", "cosine, expected", "norm", "cosine of a draw", "spread of a draw", "forwards", "per forward")
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for name, row in sorted(found["designs"].items(), key=lambda item: -item[1]["cosine_of_a_draw"]):
        cells = [f"{row[key]:.3f}" for key in ("cosine", "norm_ratio", "cosine_of_a_draw")]
        cells += [f"{row['spread']:.2f}", f"{row['forwards']:.1f}", f"{row['cosine_of_a_draw'] / row['forwards']:.3f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> None:
    """Cosine against cost, and connectors against the length of the leap."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    for name, row in found["designs"].items():
        published = name in SEVEN
        left.scatter(row["forwards"], row["cosine_of_a_draw"], color="C0" if published else "0.7", zorder=3)
        if published:
            left.annotate(name, (row["forwards"], row["cosine_of_a_draw"]), fontsize=8, xytext=(4, 4),
                          textcoords="offset points")  # fmt: skip
    left.set(xlabel="forwards with gradient per sample", ylabel="cosine of one draw with full backpropagation")
    for order in ORDERS:
        points = [(p["length"], p["distance"]) for p in found["connectors"] if p["order"] == order]
        right.plot(*zip(*points, strict=True), label="Euler leap" if order == 1 else f"Lagrange, {order} supports")
    right.set(xlabel="leap, in sampling steps", ylabel="mean |surrogate − cached state|", yscale="log")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="shapes_flowbp_sparse")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rows", type=int, default=16, help="trajectories")
    parser.add_argument("--draws", type=int, default=32, help="of each design")
    parser.add_argument("--only", nargs="+", help="designs whose name begins so")
    parser.add_argument("--table", type=Path, help="a file that this command printed")
    parser.add_argument("--plot", type=Path, help="with --table: draw it there")
    options = parser.parse_args()
    if options.table is not None:
        found = json.loads(options.table.read_text())
        if options.plot is not None:
            plot(found, options.plot)
        print(table(found))
        return
    torch.set_num_threads(1)
    problem = prepare(options.config, options.rows, options.overrides)
    truth, asked = full(problem), options.only or [""]
    chosen = {name: spec for name, spec in designs().items() if any(name.startswith(part) for part in asked)}
    about = {"config": options.config, "overrides": options.overrides, "rows": problem.rows}
    about |= {"steps": len(problem.cache.v), "parameters": truth.numel(), "norm": float(truth.norm())}
    measured = {name: partial(measure, problem, truth)(spec, options.draws) for name, spec in chosen.items()}
    print(json.dumps(about | {"designs": measured, "connectors": list(connectors(problem.cache))}, indent=1))


if __name__ == "__main__":
    main()
