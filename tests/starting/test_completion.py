"""Completion in real shells, and examples at the end of every command's help, which the real parser takes."""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import typer

from flowbp_ray.cli import app
from flowbp_ray.config import loading
from flowbp_ray.starting.completion import SHELLS, WORDS, script
from flowbp_ray.surrogate import METHODS
from tests.test_cli import call

PARSER = typer.main.get_command(app)
COMMANDS = sorted(PARSER.commands)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the scripts, a file and a run to complete."""
    found = tmp_path_factory.mktemp("shell")
    for shell in SHELLS:
        (found / f"script.{shell}").write_text(script(shell, PARSER))
    (found / "prompts one.txt").write_text("a cat\n")
    (found / "runs" / "mine").mkdir(parents=True)
    return found


def need(shell: str) -> str:
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"{shell} is not installed")
    return found


def by_bash(folder: Path, line: str) -> list[str]:
    """What bash offers at the end of a line: its words taken apart at = as readline does, and the function called."""
    words = [
        part for word in line.split(" ") for part in (word.replace("=", " = ").split(" ") if "=" in word else [word])
    ]
    words = [word for i, word in enumerate(words) if word or i == len(words) - 1]
    quoted = " ".join(f"'{word}'" for word in words)
    program = (f"source script.bash; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _flowbp_ray; "
               "printf '%s\\n' \"${COMPREPLY[@]}\"")  # fmt: skip
    shown = subprocess.run(["bash", "--norc", "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    assert shown.stderr == ""
    return sorted(shown.stdout.split("\n")[:-1]) if shown.stdout.strip() else []


def test_bash_offers_what_the_parser_knows(folder: Path) -> None:
    need("bash")
    assert by_bash(folder, "flowbp-ray ") == sorted([*COMMANDS, "--help"])
    assert by_bash(folder, "flowbp-ray re") == ["report", "reproduce"]
    for name, command in PARSER.commands.items():
        own = {spelled for p in command.params for spelled in (*p.opts, *p.secondary_opts) if spelled.startswith("-")}
        assert set(by_bash(folder, f"flowbp-ray {name} -")) == own | {"--help"}
    assert set(by_bash(folder, "flowbp-ray train ")) >= {path.stem for path in (loading.shipped() / "runs").iterdir()}
    assert by_bash(folder, "flowbp-ray train sd35_l") == ["sd35_leapalign", "sd35_lora_24gb"]
    assert by_bash(folder, "flowbp-ray train mine.yaml learners.optimizer.l") == ["learners.optimizer.lr="]
    held_out = {f"data.heldout{key}=" for key in ("", ".fraction", ".seed")}
    assert set(by_bash(folder, "flowbp-ray train mine.yaml steps=3 data.h")) == held_out
    assert by_bash(folder, "flowbp-ray train mine.yaml data.prompts=pro") == ["prompts one.txt"]
    assert by_bash(folder, "flowbp-ray init mine.yaml --method ") == sorted(METHODS)
    assert by_bash(folder, "flowbp-ray eval runs/mine --weights a") == ["average"]
    assert by_bash(folder, "flowbp-ray plan shapes_refl --gpus 8x80GB backbone.pa") == ["backbone.path="]
    assert by_bash(folder, "flowbp-ray report run") == ["runs"]
    assert by_bash(folder, "flowbp-ray completion ") == sorted(SHELLS)
    assert by_bash(folder, "flowbp-ray config-reference guar") == ["guard"]
    assert by_bash(folder, "flowbp-ray methods ") == by_bash(folder, "flowbp-ray trane ") == []


def typed(program: list[str], keys: list[str], folder: Path) -> str:
    """What a shell on a terminal of its own prints while keys are typed into it, one group after the other.

    Each group but the first prints a line that begins with "got:", which is waited for.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.environ.update(TERM="dumb", PS1="> ", HOME=str(folder), HISTFILE="")
        os.execvp(program[0], program)
    said, until = "", time.monotonic() + 60
    try:
        for done, group in enumerate(keys):
            os.write(terminal, group.encode())
            while time.monotonic() < until and len(re.findall(r"^got:(?!%)", said, re.MULTILINE)) < done:
                if select.select([terminal], [], [], 0.2)[0]:
                    said += os.read(terminal, 65536).decode(errors="replace").replace("\r", "\n")
    finally:
        os.write(terminal, b"\x03\x04exit\n")
        os.close(terminal)
        os.waitpid(pid, 0)
    return said


def test_a_key_press_completes_in_a_real_bash(folder: Path) -> None:
    keys = ["source script.bash; flowbp-ray() { printf 'got:%s;' \"$@\"; echo; }\n",
            "flowbp-ray conf\tlear\t\n", "flowbp-ray trai\tshapes_flowbp_la\tlearners.optimizer.l\t2e-5\n",
            "flowbp-ray train x data.prompts=pro\t\n"]  # fmt: skip
    said = typed([need("bash"), "--norc", "--noprofile", "-i"], keys, folder)
    assert "got:config-reference;got:learners;" in said
    assert "got:train;got:shapes_flowbp_lagrange;got:learners.optimizer.lr=2e-5;" in said
    assert "got:train;got:x;got:data.prompts=prompts one.txt;" in said


def test_a_key_press_completes_in_a_real_zsh(folder: Path) -> None:
    keys = ["autoload -Uz compinit && compinit -u -D; source ./script.zsh; "
            "flowbp-ray() { printf 'got:%s;' \"$@\"; echo; }\n",
            "flowbp-ray conf\tlear\t\n", "flowbp-ray trai\tshapes_flowbp_la\tlearners.optimizer.l\t2e-5\n",
            "flowbp-ray train x data.prompts=pro\t\n", "flowbp-ray eval runs/mine --weights av\t\n"]  # fmt: skip
    said = typed([need("zsh"), "-f", "-i"], keys, folder)
    assert "got:config-reference;got:learners;" in said
    assert "got:train;got:shapes_flowbp_lagrange;got:learners.optimizer.lr=2e-5;" in said
    assert "got:train;got:x;got:data.prompts=prompts one.txt;" in said
    assert "got:eval;got:runs/mine;got:--weights;got:average;" in said


def test_fish_offers_what_the_parser_knows(folder: Path) -> None:
    fish = need("fish")

    def offered(line: str) -> list[str]:
        program = f"source script.fish; complete -C {shlex.quote(line)}"
        home = os.environ | {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
        shown = subprocess.run([fish, "-c", program], cwd=folder, capture_output=True, text=True, env=home)
        assert shown.returncode == 0 and shown.stderr == ""
        return sorted(row.split("\t")[0] for row in shown.stdout.splitlines())

    assert offered("flowbp-ray ") == COMMANDS
    assert offered("flowbp-ray train sd35_l") == ["sd35_leapalign", "sd35_lora_24gb"]
    assert offered("flowbp-ray train mine.yaml learners.optimizer.l") == ["learners.optimizer.lr="]
    assert offered("flowbp-ray init mine.yaml --method ") == sorted(METHODS)
    assert offered("flowbp-ray eval runs/mine --weigh") == ["--weights"]
    assert offered("flowbp-ray completion ") == sorted(SHELLS)
    assert offered("flowbp-ray config-reference guar") == ["guard"]
    assert offered("flowbp-ray report run") == ["runs/"]


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("completion", "csh") == 2
    assert "completion is there for bash, zsh, fish, not for 'csh'; write one of them" in capsys.readouterr().err
    assert call("completion", "bash") == 0
    assert capsys.readouterr().out == script("bash", PARSER)


def test_words_are_those_of_parameters() -> None:
    """A parameter that was renamed would lose its words without a sound."""
    names = {parameter.name for command in PARSER.commands.values() for parameter in command.params}
    assert set(WORDS) - {"form"} <= names


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example_that_the_parser_takes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(name, "--help") == 0
    *_, heading, example = capsys.readouterr().out.rstrip().splitlines()
    assert heading.strip() == "Example:" and example.startswith(f"    flowbp-ray {name}")
    program, command, *arguments = shlex.split(example.partition(" > ")[0])
    assert (program, command) == ("flowbp-ray", name)
    context = PARSER.commands[name].make_context(name, list(arguments))  # SystemExit or an error for a wrong one
    assert all(context.params[p.name] is not None for p in PARSER.commands[name].params if p.required)
    for override in context.params.get("overrides") or ():
        assert "=" in override
