"""An evaluation on Ray: samplers and reward servers without learners, item by item, resumable.

The values are those of an evaluation in the course of a run, from the same prompts, noise and weights.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from actors import transport
from actors.cluster import connected, start_ray
from actors.fleet import Fleet
from actors.judge_actors import Panel
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.evaluation.estimates import Estimate
from flowbp_ray.evaluation.results import SUMMARY, TABLE, Difference, Results, bootstrap, check_alike, compare
from flowbp_ray.evaluation.standalone import Request, Standalone, Weights, scales
from flowbp_ray.messages import Evaluated, Item, Version
from flowbp_ray.planning.colocation import with_parts
from flowbp_ray.preflight import check
from flowbp_ray.prompts import evaluation_prompts
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.addresses import expand
from flowbp_ray.utils.diff import shown
from flowbp_ray.utils.digest import digest
from flowbp_ray.utils.settings import MAX_CALLS_IN_FLIGHT

Tensors = Mapping[str, Tensor]

Drawn = tuple[Item, Evaluated]
LAG = 2  # items whose pictures judges have not answered about

Advance = Callable[[int, int], None]
"""Takes the items that are done and their number."""


def evaluate(
    request: Request,
    out: Path | None = None,
    notify: Callable[[str], None] = lambda line: None,
    advance: Advance = lambda done, total: None,
    against: Results | None = None,
) -> tuple[Standalone, Results]:
    """Evaluate what `request` names, in the folder `out`, and go on there where an evaluation was stopped.

    out: None is a folder of its own below the run's, or below evaluations/. notify: takes what is waited for. against:
    what it will be compared with. Raises ValueError, before any actor starts, for a mistake of the user; RunFailed for
    a later failure.
    """
    run, config = request.run(), request.config()
    evaluation_prompts(config, "--prompts" if request.prompts else "evaluation.prompts")  # by that name
    checked = check(config)
    version, tensors, of = _weights(request, run)
    folder = out or _folder(config, run, request, version)
    work = Standalone(config, checked.held_out, request.pictures, version, folder, of)
    if against is not None:
        check_alike(work.settings, against.settings)
    if work.damaged:
        notify(f"parts in {folder} that cannot be read, and are drawn again: {len(work.damaged)}")
    missing, done = work.missing(), len(work.items) - len(work.missing())
    advance(done, len(work.items))
    if missing:
        alone, texts = processes(config, len(missing)), [record.text for record in checked.held_out]
        with connected(config.cluster.address, str(folder)):
            notify("starting Ray")
            start_ray(config.cluster.address)
            with Fleet(alone, texts, checked.agreed, notify=notify, needs=work.needs, learns=False) as fleet:
                weights = fleet.built_with(version) if tensors is None else transport.restore(version, tensors)
                with Panel(config, checked.held_out, folder, notify) as panel:
                    results = drawn(fleet, missing, alone.encoder.ahead, weights)
                    for place, (item, result, scores) in enumerate(judged(results, panel)):
                        work.add(item, result, scores)
                        advance(done + place + 1, len(work.items))
    return work, work.finish()


def drawn(fleet: Fleet, items: Sequence[Item], ahead: int, weights: transport.Published) -> Iterator[Drawn]:
    """Each item with what was drawn and scored, in order."""
    for place, (item, coming) in enumerate(in_time(items, ahead)):
        fleet.encoding.advance(place)
        fleet.pipeline.submit(coming, weights)
        yield item, fleet.pipeline.result(item)


def judged(results: Iterator[Drawn], panel: Panel) -> Iterator[tuple[Item, Evaluated, dict[str, np.ndarray]]]:
    """Each result with the scores of judges, which are asked about up to LAG more items meanwhile."""
    waiting: deque[Drawn] = deque()
    for pair in results:
        panel.ask(*pair)
        waiting.append(pair)
        if len(waiting) > LAG * bool(panel.handles):
            first = waiting.popleft()
            yield *first, panel.scores(*first)
    for pair in waiting:
        yield *pair, panel.scores(*pair)


def processes(config: RunConfig, items: int) -> RunConfig:
    """The configuration of the processes. A step is an item here, and prompts are encoded as far ahead as keeps all
    busy. In pairs a sampler has its learner's part of the GPU too, so that no two samplers share one.
    """
    busy = MAX_CALLS_IN_FLIGHT * (config.samplers.count + config.rewards.count)
    encoder = config.encoder.model_copy(update={"ahead": max(config.encoder.ahead, busy)})
    placed = with_parts(config.model_copy(update={"steps": items, "encoder": encoder}))
    if config.cluster.colocate != "pairs":
        return placed
    whole = round(placed.samplers.gpus + placed.learners.gpus, 3)
    return placed.model_copy(update={"samplers": placed.samplers.model_copy(update={"gpus": whole})})


def in_time(items: Sequence[Item], ahead: int) -> Iterator[tuple[Item, Sequence[Item]]]:
    """Each item, in order, with those to submit before it is waited for: never further than `ahead` items beyond it.

    The prompts of that many items are held and encoded first. An item beyond them would have its own encoded before.
    """
    for place, item in enumerate(items):
        yield item, items[place + ahead if place else 0 : place + ahead + 1]


def _weights(request: Request, run: Run | None) -> tuple[Version, Tensors | None, dict[str, Any]]:
    """The version, its tensors (None: those of the model's files), and their names for settings.json."""
    if run is None or request.weights == "base":
        return Version(0, 0), None, {"model": "base" if run is None else f"base of {run.config.name}"}
    average = request.weights == "average"
    step, tensors = run.checkpoints.weights(request.step, average)
    kind = "average" if average and run.checkpoints.has_average(step) else "raw"
    return (
        Version(0, step, kind == "average"),
        tensors,
        {
            "model": f"{run.config.name}, {kind} of step {step}",
            "digest": digest(tensors),
        },
    )


def _folder(config: RunConfig, run: Run | None, request: Request, version: Version) -> Path:
    """Where the results go unless it is said: by prompts, weights and step."""
    prompts = re.sub(r"[:*?\[\]]", "_", Path(str(config.evaluation.prompts)).stem)
    base = run is None or request.weights == "base"
    name = f"{prompts}_base" if base else f"{prompts}_{'average' if version.ema else 'raw'}_{version.step:06d}"
    return (Path(config.output) / "evaluations" / config.name if run is None else run.folder / "evaluations") / name


def command(
    console: Console,
    target: str,
    prompts: str | None,
    guidance: str | None,
    pictures: int,
    weights: str,
    step: int | None,
    overrides: tuple[str, ...],
    *,
    against: Path | None,
    out: Path | None,
    judges: bool,
) -> None:
    """`flowbp-ray eval`: evaluate with a progress bar, print the table and where everything is."""
    if weights not in get_args(Weights):
        raise ValueError(f"--weights must be one of {', '.join(get_args(Weights))}, got {shown(weights)}")
    request = Request(
        target, prompts, scales(guidance or ""), pictures, cast(Weights, weights), step, overrides, judges
    )
    other = None if against is None else Results.read(Path(expand(str(against))))
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("starting", total=None)
        work, results = evaluate(
            request,
            None if out is None else Path(expand(str(out))),
            lambda line: bar.update(task, description=escape(line)),
            lambda done, total: bar.update(task, description="drawing and scoring", completed=done, total=total),
            other,
        )
    console.print(escape(f"{results.settings['model']}, {results.settings['prompts']} prompts"))
    differences = {} if other is None else compare(results, other)
    for scale in results.values:
        console.print(_table(results, scale, differences.get(scale, {})))
    if other is not None:
        console.print(escape(f"differences are from {other.settings['model']}, prompt by prompt; p by the sign test"))
    console.print(
        escape(f"{work.folder}: {TABLE} has each picture's values, {SUMMARY} the means, and there are sheets")
    )


def _table(results: Results, guidance: float, differences: Mapping[str, Difference]) -> Table:
    """Means with bootstrap intervals, or the paired differences from another evaluation: 80 columns hold one."""
    title = f"guidance {guidance:g} (95 % bootstrap intervals over prompts)"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in ("metric", "mean", "prompts", *(("difference", "p") if differences else ())):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for metric in results.values[guidance]:
        mean = bootstrap(results.by_prompt(guidance, metric))
        shown = _estimate(mean).partition(" [")[0] if differences else _estimate(mean)
        row = [escape(metric), shown, str(mean.count)]
        if metric in differences:
            row += [_estimate(differences[metric].estimate, "+"), f"{differences[metric].p:.2g}"]
        table.add_row(*row)
    return table


def _estimate(e: Estimate, sign: str = "") -> str:
    if e.mean is None:
        return "none"
    return f"{e.mean:{sign}.4f}" + (f" [{e.low:.4f}, {e.high:.4f}]" if e.low is not None else "")
