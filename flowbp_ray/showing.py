"""What commands print: the tables of a finished run, a step's plans, the named methods."""

from __future__ import annotations

import inspect

from rich.markup import escape
from rich.table import Table

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.surrogate.methods import METHODS


def planned(settings: RunConfig, step: int, describe: bool) -> str:
    """How many samples, plans, products and states a step has; with `describe` the plans themselves."""
    from flowbp_ray.rollout.items import plans_of_step

    model, method = settings.backbone, settings.surrogate()
    sigmas = model.open().sigmas(model.num_steps, model.height, model.width)
    plans = plans_of_step(method, sigmas, settings.plan_seed, step, settings.data.shape.batch)
    budget = method.max_terms(model.num_steps)
    lines = [
        f"step {step}: {len(plans)} samples, {len(set(plans))} different plan(s); per sample at most {budget.terms} "
        f"VJPs{' and the junction' if budget.junction else ''}, {len(plans[0].states)} states travel"
    ]
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
