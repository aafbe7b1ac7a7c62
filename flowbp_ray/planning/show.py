"""What `flowbp-ray plan` and `flowbp-ray methods` print: tables of at most 100 columns."""

from __future__ import annotations

import inspect

from rich.markup import escape
from rich.table import Table

from flowbp_ray.backbones.registry import build_backbone
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning.costs import noised_times
from flowbp_ray.planning.forecast import Forecast
from flowbp_ray.planning.memory import Role
from flowbp_ray.surrogate.methods import METHODS
from flowbp_ray.utils.units import format_bytes, format_seconds


def tables(plan: Forecast) -> list[Table]:
    """Three tables: parameters and bytes, memory of each role, work of each role."""
    return [_sizes(plan), _memory(plan), _work(plan)]


def _sizes(plan: Forecast) -> Table:
    sizes, moved = plan.sizes, plan.traffic
    table = Table(title="model and traffic", title_justify="left")
    table.add_column("what")
    table.add_column("how much", justify="right")
    table.add_column("of it", overflow="fold")
    table.add_row("transformer", f"{sizes.transformer:,}", f"trained {sizes.trained:,} parameters")
    table.add_row("VAE", f"{sizes.vae:,}", "parameters, encoder included")
    for name, count in sizes.encoders.items():
        table.add_row(name, f"{count:,}", "parameters, while prompts are encoded")
    parts = {"states": moved.states, "targets": moved.targets, "cotangents": moved.cotangents}
    optional = {"velocities": moved.velocities, "the base's": moved.base, "forward process": moved.forward}
    parts |= {name: nbytes for name, nbytes in optional.items() if nbytes}
    listed = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in parts.items())
    table.add_row("bytes per image", format_bytes(moved.per_image), f"at most: {listed}")
    table.add_row("bytes per weight update", format_bytes(moved.per_update), "once to each node with samplers")
    if moved.between_learners:
        table.add_row("bytes between learners", format_bytes(moved.between_learners), "each sends in a step")
    encoding = plan.encoding
    drawn = f"{'' if encoding.counted else 'at most '}{encoding.prompts:,} prompts are drawn, and encoded once"
    table.add_row("bytes per prompt", format_bytes(moved.per_prompt), "the longest text")
    table.add_row("bytes of all prompts", format_bytes(encoding.nbytes), drawn)
    table.add_row("time to encode them", format_seconds(encoding.seconds), "about, if the cache has none of them")
    held = f"{moved.images} images, {moved.versions} versions of the weights, {moved.held:,} prompts"
    table.add_row("object store in flight", format_bytes(moved.in_flight), held)
    table.add_row("host memory", format_bytes(plan.host), "all nodes together, while everything is built")
    if plan.saving:
        table.add_row("copies of the state", format_bytes(plan.saving), "on the hosts, while a checkpoint is written")
    return table


def _memory(plan: Forecast) -> Table:
    table = Table(title="memory of one process", title_justify="left")
    table.add_column("role")
    table.add_column("what")
    table.add_column("when")
    table.add_column("bytes", justify="right")
    for role in plan.placed:
        for share in role.shares:
            table.add_row(
                "",
                share.name,
                (share.phase or "always") + (", on the host" if share.place == "host" else ""),
                format_bytes(share.nbytes),
            )
        if role.overhead:
            table.add_row("", "workspace and fragmentation", "always", format_bytes(role.overhead))
        table.add_row(f"{role.count} {role.name}", _where(role), role.fullest, format_bytes(role.nbytes), style="bold")
        table.add_section()
    return table


def _where(role: Role) -> str:
    if not role.gpus:
        return "at its fullest, on the CPU"
    return "at its fullest, on a GPU" if role.gpus >= 1 else f"at its fullest, on {role.gpus:g} of a GPU"


def _work(plan: Forecast) -> Table:
    table = Table(title="work of one optimizer step", title_justify="left")
    for name in ("role", "one call"):
        table.add_column(name)
    for name in ("calls", "rows", "forwards", "TFLOP", "share", "suggested"):
        table.add_column(name, justify="right")
    total = sum(work.time for work in plan.work)
    for work, count in zip(plan.work, plan.ratio, strict=True):
        numbers = (work.calls, work.rows, work.forwards, work.flops / 1e12)
        shown = [f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:.2g}" for number in numbers]
        table.add_row(work.role, work.what, *shown, f"{work.time / total:.0%}", str(count))
    return table


NOTES = (
    "forwards: as many rows of a forward without gradient cost the same. share: of the time, fp32 counting twice "
    "beside bf16 on GPUs; at staleness 0 the roles wait for one another. Not counted as work: the rewards' own "
    "models, and evaluations. Attention is planned for flash kernels, whose memory is linear in the tokens."
)


def planned(config: RunConfig, step: int, describe: bool) -> str:
    """How many samples, plans, VJPs and states a step has; with `describe` the first three plans themselves."""
    from flowbp_ray.rollout.items import plans_of_step

    model, method = config.backbone, config.surrogate()
    sigmas = build_backbone(model).sigmas(model.num_steps, model.height, model.width)
    plans = plans_of_step(method, sigmas, config.plan_seed, step, config.data.shape.batch)
    budget = method.max_terms(model.num_steps)
    lines = [
        f"step {step}: {len(plans)} samples, {len(set(plans))} different plan(s); per sample at most {budget.terms} "
        f"VJPs{' and the junction' if budget.junction else ''}, {len(plans[0].states)} states travel"
    ]
    if times := noised_times(config):
        terms = ", ".join(term.name for term in config.rewards.scored)
        lines.append(f"without gradient, by DiffusionNFT: {terms}; per sample at most {times} VJPs at noised samples")
    lines += [different.describe() for different in list(dict.fromkeys(plans))[:3]] if describe else []
    return escape("\n".join(lines))


def methods_table() -> Table:
    """The named methods with their arguments."""
    table = Table(title="named methods")
    table.add_column("name")
    table.add_column("arguments and defaults")
    table.add_column("what it is")
    for name, factory in METHODS.items():
        arguments = ", ".join(f"{p.name}={p.default}" for p in inspect.signature(factory).parameters.values())
        table.add_row(name, arguments, (factory.__doc__ or "").split(": ", 1)[-1])
    return table
