"""Commands that measure: eval, compare, reproduce and bench; and what all commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from flowbp_ray.utils.addresses import expand
from flowbp_ray.utils.console import lasting_output

app = typer.Typer()
console = Console(highlight=False, soft_wrap=True)

ConfigArgument = Annotated[str, typer.Argument(help="A YAML file, or a shipped name such as shapes_flowbp_sparse.")]
OverridesArgument = Annotated[list[str] | None, typer.Argument(help="key=value, dotted: learners.optimizer.lr=2e-5")]


@app.command("eval")
def evaluate(
    target: Annotated[str, typer.Argument(help="The folder of a run; or a YAML file or shipped name, for its model.")],
    overrides: OverridesArgument = None,
    prompts: Annotated[str | None, typer.Option(help="A file. Default: evaluation.prompts.")] = None,
    guidance: Annotated[str | None, typer.Option(help="1,3. Default: evaluation.guidance.")] = None,
    pictures: Annotated[int, typer.Option(help="Of each prompt, each from its own noise.", min=1)] = 1,
    weights: Annotated[str, typer.Option(help="Of a run: average, raw, or base, which it began with.")] = "average",
    step: Annotated[int | None, typer.Option(help="Which checkpoint (default: the newest).")] = None,
    against: Annotated[Path | None, typer.Option(help="The folder of another evaluation, to subtract.")] = None,
    out: Annotated[Path | None, typer.Option(help="Default: evaluations/ in the folder of the run.")] = None,
    judges: Annotated[bool, typer.Option("--judges", help="Ask the configuration's judges too.")] = False,
) -> None:
    """Measure a checkpoint or a model on a file of prompts; the same command goes on after a stop.

    Example: flowbp-ray eval runs/shapes_demo --prompts shapes:dev --guidance 1,3 --pictures 2
    """
    from flowbp_ray.evaluate import command

    with lasting_output("stopped; the same command goes on from the parts that are written"):
        asked = (prompts, guidance, pictures, weights, step, tuple(overrides or ()))
        command(console, target, *asked, against=against, out=out, judges=judges)


@app.command()
def compare(
    suite: Annotated[str, typer.Argument(help="A YAML file with name, config, overrides, seeds, rows, columns.")],
    out: Annotated[Path, typer.Option(help="The folder of the runs, the table and the page.")] = Path("suites"),
    at_once: Annotated[int, typer.Option(help="Runs at a time.", min=1)] = 1,
    address: Annotated[str | None, typer.Option(help="A cluster's dashboard, for its jobs. Default: here.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Run nothing: the table and the page of what there is.")] = False,
) -> None:
    """Train the rows of a suite with every seed, and put what they measured beside each other.

    The same command goes on after a stop. Example: flowbp-ray compare methods.yaml --at-once 4
    """
    from flowbp_ray.comparing.command import run

    with lasting_output("stopped; the same command goes on"):
        failed = run(suite, Path(expand(str(out))), at_once, address, show, lambda line: console.print(escape(line)))
    if failed:
        raise typer.Exit(1)


@app.command()
def reproduce(
    run: Annotated[str, typer.Argument(help="The folder of a run that has ended.")],
    overrides: OverridesArgument = None,
) -> None:
    """Run a stored configuration again, and say whether numbers and weights are the same bits. Exits with 1 if not.

    Example: flowbp-ray reproduce runs/shapes_demo
    """
    from flowbp_ray.artifacts.reproduction import again, compare_runs
    from flowbp_ray.driver import train as run_training
    from flowbp_ray.observability.progress import Progress
    from flowbp_ray.run.folder import Run

    first = Run.open(run)
    config = again(first, overrides or [])
    with lasting_output("stopped at once; nothing was compared"):
        found = compare_runs(first, run_training(config, Progress(config.steps, console=console))[0])
        console.print(escape("\n".join(found.lines())))
    if not found.identical:
        raise typer.Exit(1)


@app.command()
def bench(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    samplers: Annotated[str | None, typer.Option(help="Counts to measure: 1,2,4.")] = None,
    learners: Annotated[str | None, typer.Option(help="1,2.")] = None,
    rewards: Annotated[str | None, typer.Option(help="1,2.")] = None,
    staleness: Annotated[str | None, typer.Option(help="0,1.")] = None,
    seconds: Annotated[float, typer.Option(help="To measure at each ratio, and at least three steps.", min=0)] = 20,
    emulate: Annotated[str | None, typer.Option(help="A profile: sd35_m_h100, flux1_dev_h100, or a file.")] = None,
    time_scale: Annotated[float | None, typer.Option(help="Emulated waits times this.")] = None,
    bytes_scale: Annotated[float | None, typer.Option(help="Emulated weights times this.")] = None,
    simulate: Annotated[int, typer.Option(help="Then simulate up to so many samplers.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="A folder for bench.json and bench.png.")] = Path("bench"),
) -> None:
    """Measure throughput at ratios of samplers, learners and reward servers, beside what `plan` predicts."""
    from flowbp_ray.bench import open_loops
    from flowbp_ray.benching import measure, profile

    emulated = profile.load(emulate).scaled(time_scale, bytes_scale) if emulate else None
    counts = (samplers, learners, rewards, staleness)
    out = Path(expand(str(out)))
    with lasting_output("stopped at once; a bench writes its results at its end"):
        result = measure.run(config, overrides or [], counts, seconds, open_loops, emulated, simulate, console.print)
    for part in result.tables():
        Console(highlight=False, width=None if console.is_terminal else 120).print(part)
    for line in [*result.lines(), *map(str, result.write(out))]:
        console.print(escape(line))
