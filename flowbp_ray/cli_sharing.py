"""Commands that hand a result on: sample and export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from flowbp_ray.cli_measuring import console
from flowbp_ray.utils.addresses import expand

app = typer.Typer()


@app.command()
def sample(
    run: Annotated[str, typer.Argument(help="The folder of a run.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="A prompt; may be given several times.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The picture (default: sample.png); with --files, a folder.")
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Pictures of each prompt, from --seed on.", min=1)] = 1,
    seed: Annotated[
        list[int] | None, typer.Option(help="Of the noise (default: 0); may be given several times.")
    ] = None,
    negative: Annotated[str, typer.Option(help="What not to draw; needs guidance above 1.")] = "",
    guidance: Annotated[float | None, typer.Option(help="From 1, which is none. Default: the run's.")] = None,
    step: Annotated[int | None, typer.Option(help="Which checkpoint (default: the newest).")] = None,
    files: Annotated[bool, typer.Option("--files", help="A file per picture instead of one sheet.")] = False,
) -> None:
    """Draw prompts with a run's checkpoint, in this process. A PNG holds the settings that it was drawn with.

    Example: flowbp-ray sample runs/shapes_demo -p "a red circle" -p "two blue squares" --n 4 --files -o samples
    """
    from flowbp_ray import drawing
    from flowbp_ray.run.folder import Run

    opened, seeds = Run.open(run), drawing.seeds_of(seed or [0], n)
    to = Path(expand(str(output or ("samples" if files else "sample.png"))))
    drawing.check_output(to, files)
    drawn = drawing.draw(opened, prompt, step, guidance, seeds, negative)
    saved = drawing.save(drawn, to, files)
    console.print(escape(f"step {drawn.step}: {to}" + (f", {len(saved)} files" if files else "")))


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="The folder of a run.")],
    to: Annotated[Path, typer.Option(help="A new folder.")],
    step: Annotated[int | None, typer.Option(help="Which checkpoint (default: the newest).")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="The average of the weights instead of the weights.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Merge adapters into a whole transformer.")] = False,
    form: Annotated[str, typer.Option("--format", help="diffusers; adapters also for comfyui or kohya.")] = "diffusers",
    base: Annotated[
        str | None, typer.Option(help="What the card calls the base, such as black-forest-labs/FLUX.1-dev.")
    ] = None,
    push: Annotated[str | None, typer.Option(help="A repository of the Hugging Face Hub: organisation/name.")] = None,
    private: Annotated[bool, typer.Option("--private", help="A repository that --push makes is private.")] = False,
) -> None:
    """Write a checkpoint as diffusers, ComfyUI or kohya's tools load it, with a model card.

    Example: flowbp-ray export runs/mine --to mine_comfyui --ema --format comfyui --push me/mine
    """
    from flowbp_ray.artifacts import push as hub
    from flowbp_ray.artifacts.export import export as write
    from flowbp_ray.run.folder import Run

    opened, to = Run.open(run), Path(expand(str(to)))
    if push is not None:
        hub.check_repo(push)
    done = write(opened, to, step, ema, merge, form, base)
    console.print(escape(f"step {done.step}, {done.kind}: {to}; {to / 'README.md'} says how to load it"))
    if opened.config.learners.ema is not None and not ema:
        console.print("evaluations and `sample` use the average of the weights, which --ema exports; this is not it")
    if push is not None:
        console.print(escape(f"pushed: {hub.push(to, push, private, f'{opened.folder.name}, step {done.step}')}"))
