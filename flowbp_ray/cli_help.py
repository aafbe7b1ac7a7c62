"""What helps at the command line: an example at the end of each command's help, and completion by the shell."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def completion(context: typer.Context, shell: Annotated[str, typer.Argument(help="bash, zsh or fish.")]) -> None:
    """Print a script that completes commands, options, keys and shipped configurations in a shell.

    For zsh it goes to ~/.zfunc/_flowbp-ray, with ~/.zfunc in fpath; for fish to
    ~/.config/fish/completions/flowbp-ray.fish. Example: flowbp-ray completion bash >
    ~/.local/share/bash-completion/completions/flowbp-ray
    """
    from flowbp_ray.starting.completion import script

    assert context.parent is not None
    print(script(shell, context.parent.command), end="")


def end_with_examples(door: typer.Typer) -> None:
    """Move the example of each command from its docstring, where it stands last, to the end of what --help prints.

    There it is a line of its own, whatever its length, to be copied.
    """
    for group in [door, *(info.typer_instance for info in door.registered_groups)]:
        for command in group.registered_commands if group is not None else ():
            said, _, example = inspect.cleandoc(command.callback.__doc__ or "").partition("Example: ")
            command.help = said.rstrip()
            if example:
                command.epilog = f"\b\nExample:\n  {' '.join(example.split())}"
