"""Command line. A user error prints one line and exits with 2; a run that failed exits with 1.

init | doctor | train | encode | sample | export | report | eval | compare | reproduce | plan | bench
scale | status | methods | config-reference | serve-reward | completion
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from flowbp_ray.artifacts.report import print_summary
from flowbp_ray.cli_help import app as helping
from flowbp_ray.cli_help import end_with_examples
from flowbp_ray.cli_measuring import ConfigArgument, OverridesArgument, console
from flowbp_ray.cli_measuring import app as measuring
from flowbp_ray.cli_sharing import app as sharing
from flowbp_ray.config import loading
from flowbp_ray.planning.show import methods_table
from flowbp_ray.utils.addresses import expand
from flowbp_ray.utils.console import guarded, lasting_output

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, help=__doc__, pretty_exceptions_enable=False
)
app.add_typer(measuring)
app.add_typer(helping)
app.add_typer(sharing)


@app.command()
def train(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Train, with progress, pictures and a table before → after.

    Example: flowbp-ray train shapes_flowbp_bridge steps=60 learners.optimizer.lr=2e-4
    """
    from flowbp_ray.driver import train as run_training
    from flowbp_ray.observability.progress import Progress

    loaded = loading.load(config, overrides or [])
    with lasting_output("stopped at once; resume=auto goes on from the last checkpoint"):
        run, summary = run_training(loaded, Progress(loaded.steps, console=console))
        print_summary(console, run.folder, summary)
        console.print(escape(f"all of it on one page: flowbp-ray report {run.folder}"))


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="The YAML file to write.")],
    model: Annotated[str | None, typer.Option(help="A diffusers folder, or shapes for the embedded model.")] = None,
    method: Annotated[str | None, typer.Option(help="Such as flowbp_sparse; `methods` lists them.")] = None,
    reward: Annotated[str | None, typer.Option(help="Such as hpsv2.")] = None,
    prompts: Annotated[str | None, typer.Option(help="A file of prompts.")] = None,
    gb: Annotated[int | None, typer.Option(help="Of your one GPU; 0 for eight of 80 GB.", min=0)] = None,
) -> None:
    """Write a configuration to begin with; what is not given is asked.

    Example: flowbp-ray init mine.yaml --model /models/FLUX.1-dev --reward hpsv2 --prompts prompts.txt --gb 24
    """
    from flowbp_ray.starting import scaffold

    file = Path(expand(str(file)))
    given = {"name": file.stem, "model": model, "method": method, "reward": reward, "prompts": prompts, "gb": gb}
    ask = (lambda question, default: str(typer.prompt(question, default=default))) if sys.stdin.isatty() else None
    lines = scaffold.write(file, scaffold.asked(given, ask))
    console.print(escape("\n".join([f"wrote {file}; next:", *lines])))


@app.command()
def doctor(
    config: Annotated[str | None, typer.Argument(help="A configuration to check too.")] = None,
    overrides: OverridesArgument = None,
) -> None:
    """Say what this machine has and what would stop a run; exits with 1 if something would.

    Example: flowbp-ray doctor mine.yaml
    """
    from flowbp_ray.starting.doctor import examine

    stops = 0
    for line in examine(config, overrides or []):
        stops += line.kind == "stop"
        sign = {"ok": " ", "warn": "!", "stop": "x"}[line.kind]
        console.print(escape(f"{sign} {line.name}: {line.value}" + (f" -- {line.advice}" if line.advice else "")))
    console.print("nothing would stop a run" if not stops else f"{stops} of these would stop a run (x)")
    if stops:
        raise typer.Exit(1)


@app.command()
def encode(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Fill the embedding cache with the prompts that a run draws, in this process, which ends with its encoders.

    Example: flowbp-ray encode mine.yaml encoder.cache=/shared/embeddings
    """
    from rich.progress import Progress as Bar

    from flowbp_ray.local import fill_cache
    from flowbp_ray.preflight import about_prompts, drawn_texts
    from flowbp_ray.prompts import read_prompts

    loaded = loading.load(config, overrides or [])
    prompts = read_prompts(loaded)
    texts = drawn_texts(loaded, *prompts)
    with lasting_output("stopped; what was encoded stays in the cache"):
        for line in about_prompts(loaded, *prompts):
            console.print(escape(line))
        with Bar(console=console) as bar:
            task = bar.add_task("encoding", total=None)
            encoded = fill_cache(loaded, texts, lambda done, total: bar.update(task, completed=done, total=total))
        console.print(escape(encoded.describe()))


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="The folder of a run, ended or not; or of a suite that was compared.")],
    out: Annotated[Path | None, typer.Option(help="The page. Default: report.html in that folder.")] = None,
) -> None:
    """Write one HTML page of a run or a suite, which needs no network: pictures, measurements, curves, times.

    Example: flowbp-ray report runs/shapes_demo --out demo.html
    """
    from flowbp_ray.artifacts.html_report import write_report
    from flowbp_ray.comparing import command as comparing

    page = None if out is None else Path(expand(str(out)))
    if comparing.is_suite(Path(expand(run))):
        console.print(escape(f"{comparing.report(Path(expand(run)), page)}: open it in a browser"))
        return
    written = write_report(expand(run), page)
    console.print(escape(f"{written.path} ({written.bytes / 1e6:.1f} MB): open it in a browser"))


@app.command()
def plan(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    describe: Annotated[bool, typer.Option("--describe", help="Print the surrogate plan of a step instead.")] = False,
    step: Annotated[int, typer.Option(help="Which step.")] = 0,
    gpus: Annotated[str | None, typer.Option(help="Would it fit there? 8x80GB, or 4x141GB+8x80GB.")] = None,
    host_memory: Annotated[str | None, typer.Option(help="Of all nodes together, such as 2TB.")] = None,
    cluster: Annotated[bool, typer.Option("--cluster", help="Would it fit on the running Ray cluster?")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a run needs and what a step does, from config.json alone: nothing is loaded or started.

    Example: flowbp-ray plan flux1_lora_24gb --gpus 1x24GB backbone.path=/models/FLUX.1-dev
    """
    from flowbp_ray.planning.command import print_plan, print_surrogate

    loaded = loading.load(config, overrides or [])
    if describe:
        print_surrogate(loaded, step, console)
        return
    running = None
    if cluster:
        from actors.cluster import nodes

        running = nodes()
    verdict = print_plan(loaded, step, console, gpus, host_memory, running, json_)
    if verdict is not None and not verdict.fits:
        print(f"flowbp-ray: {verdict.line}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def scale(
    run: Annotated[str, typer.Argument(help="The folder of a run that is going on.")],
    sizes: Annotated[list[str], typer.Argument(help="samplers=6 rewards=2")],
) -> None:
    """Ask a run for more or fewer samplers and reward servers; it follows between two steps.

    Example: flowbp-ray scale runs/mine samplers=6 rewards=2
    """
    from flowbp_ray.control import scaling
    from flowbp_ray.observability.reader import Reader

    reader = Reader(run)
    opened, seen = reader.run, reader.snapshot()
    wished = scaling.parse(seen.status.bounds or scaling.bounds(opened.config), sizes)
    if seen.stage == "ended":
        raise ValueError(f"{opened.folder} is over ({seen.state}); samplers.count and rewards.count are for the next")
    scaling.request(opened, wished)
    shown = " ".join(f"{role}={size}" for role, size in wished.items())
    console.print(f"asked for {shown}; it follows after the step that it is at, and says so in {opened.folder}/log.txt")


@app.command()
def status(
    run: Annotated[str, typer.Argument(help="The folder of a run, from any machine that sees it.")],
    watch: Annotated[
        bool | None, typer.Option("--watch/--once", help="While the run goes on; the default on a terminal.")
    ] = None,
) -> None:
    """Say what a run is doing, from its files alone: it may go on, have ended or have been killed.

    Example: flowbp-ray status runs/mine --watch
    """
    from flowbp_ray.observability.status_view import print_status

    wide = Console(highlight=False, width=None if console.is_terminal else 160)
    print_status(run, console.is_terminal if watch is None else watch, wide)


@app.command("serve-reward")
def serve_reward(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 for every address it has.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 for a free one.", min=0, max=65535)] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(help="Holds the token. Default: $FLOWBP_RAY_REWARD_TOKEN, then rewards.token_file.")
    ] = None,
    max_rows: Annotated[int | None, typer.Option(help="Of one request. Default: what this run sends.", min=1)] = None,
    waiting: Annotated[int, typer.Option(help="Requests that wait while one is scored.", min=0)] = 8,
) -> None:
    """Score for runs elsewhere, which name this server in rewards.url; SIGTERM ends it when its work is done.

    Example: flowbp-ray serve-reward mine.yaml --host 0.0.0.0 --port 8000 --token-file token rewards.gpus=1
    """
    from flowbp_ray.rewards.remote.command import serve

    serve(loading.load(config, overrides or []), host, port, token_file, max_rows, waiting, console.print)


@app.command()
def methods() -> None:
    """List the named methods with their arguments.

    Example: flowbp-ray methods
    """
    console.print(methods_table())
    console.print("Any other point of the four axes can be spelled out under `method:`; see docs/adding-a-method.md.")


@app.command("config-reference")
def config_reference(
    section: Annotated[str, typer.Argument(help="Such as learners, or learners.optimizer.lr. Default: all.")] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/configuration.md.")] = False,
) -> None:
    """Say what each key of a configuration means, with its type and its default.

    Example: flowbp-ray config-reference learners.optimizer
    """
    from flowbp_ray.config import reference

    print(reference.page() if markdown else reference.text(section), end="")


end_with_examples(app)


def main() -> None:
    """Entry point of flowbp-ray and python -m flowbp_ray."""
    guarded(app)
