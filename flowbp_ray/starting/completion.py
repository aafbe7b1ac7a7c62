"""`flowbp-ray completion`: a script that completes commands, options, keys and shipped names in bash, zsh or fish.

It is made from the parser once, and runs without Python: a key press must not wait for torch to be imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowbp_ray.config import loading
from flowbp_ray.config.reference import keys
from flowbp_ray.starting.scaffold import FILES
from flowbp_ray.surrogate.methods import METHODS

NAME = "flowbp-ray"
SHELLS = ("bash", "zsh", "fish")
WORDS: Mapping[str, tuple[str, ...]] = {
    "method": tuple(METHODS),
    "reward": tuple(FILES),
    "weights": ("average", "raw", "base"),
    "form": ("diffusers", "comfyui", "kohya"),
    "sizes": ("samplers=", "rewards="),
    "shell": SHELLS,
}
"""Name of a parameter -> the words that it may be."""


@dataclass(frozen=True)
class Option:
    """An option of a command: its spellings, what it says of itself, whether a value follows, and its words."""

    names: tuple[str, ...]
    help: str
    valued: bool
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """A command: its options and the kinds of its arguments, of which the last may be repeated.

    kinds: "config" (a shipped name or a file), "overrides", "section", "files", or "words …".
    """

    name: str
    help: str
    options: tuple[Option, ...]
    kinds: tuple[str, ...]
    repeats: bool


def script(shell: str, parser: Any) -> str:
    """The script for a shell. parser: the command with its sub-commands, as typer makes it.

    Raises ValueError for another shell.
    """
    if shell not in SHELLS:
        raise ValueError(f"completion is there for {', '.join(SHELLS)}, not for {shell!r}; write one of them")
    commands = list(_commands(parser))
    lists = {"config": _configs(), "overrides": _keys(), "section": _sections()}
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](commands, lists)


def _configs() -> list[str]:
    return sorted(path.stem for path in (loading.shipped() / "runs").glob("*.yaml"))


def _keys() -> list[str]:
    """Keys that can be written after a configuration, each with its equals sign; without those of entries of lists."""
    return [f"{name}=" for name in dict.fromkeys(key.name for key in keys()) if "[" not in name]


def _sections() -> list[str]:
    return list(dict.fromkeys(key.name.partition(".")[0] for key in keys()))


def _commands(parser: Any) -> Iterator[Command]:
    for name, command in parser.commands.items():
        options, kinds, repeats = [], [], False
        for parameter in command.params:
            words = WORDS.get(parameter.name, ())
            if not str(parameter.opts[0]).startswith("-"):
                repeats = parameter.nargs == -1
                listed = {"target": "config"}.get(parameter.name, parameter.name)
                known = listed in ("config", "overrides", "section")
                kinds.append(listed if known else " ".join(("words", *words)) if words else "files")
                continue
            spelled = (*parameter.opts, *parameter.secondary_opts)
            options.append(Option(spelled, _plain(parameter.help), not parameter.is_flag, words))
        options.append(Option(("--help",), "Show this message and exit.", False))
        yield Command(name, _plain(command.help).partition(".")[0], tuple(options), tuple(kinds), repeats)


def _plain(words: str | None) -> str:
    """On one line and without what means something to a shell."""
    return re.sub(r"[\[\]'\"`$\\]", "", " ".join((words or "").split()))


def _bash(commands: Sequence[Command], lists: Mapping[str, Sequence[str]]) -> str:
    cases, values = [], []
    for command in commands:
        spelled = " ".join(name for option in command.options for name in option.names)
        valued = " ".join(name for option in command.options if option.valued for name in option.names)
        kinds = " ".join(f'"{kind}"' for kind in command.kinds)
        cases.append(f'        {command.name}) options="{spelled}"; valued=" {valued} "; kinds=({kinds});'
                     f" repeats={int(command.repeats)} ;;")  # fmt: skip
        for option in (option for option in command.options if option.words):
            for name in option.names:
                values.append(f'        "{command.name} {name}") kind="words {" ".join(option.words)}" ;;')
    filled = {"commands": " ".join(c.name for c in commands), "cases": "\n".join(cases), "values": "\n".join(values)}
    return _fill(BASH, filled | {key: " ".join(words) for key, words in lists.items()})


def _zsh(commands: Sequence[Command], lists: Mapping[str, Sequence[str]]) -> str:
    described = "\n".join(f"        '{c.name}:{c.help.replace(':', ' ')}'" for c in commands)
    cases = []
    for command in commands:
        specs = []
        for option in command.options:
            follows = ""
            if option.valued:
                follows = f":value:({' '.join(option.words)})" if option.words else ":value:_files"
            specs += [f"'{name}[{option.help}]{follows}'" for name in option.names]
        for place, kind in enumerate(command.kinds, 1):
            repeated = command.repeats and place == len(command.kinds)
            first, *words = kind.split()
            action = (
                f"({' '.join(words)})" if first == "words" else "_files" if first == "files" else f"_flowbp_ray_{kind}"
            )
            specs.append(f"'{'*' if repeated else place}:{first}:{action}'")
        lines = " \\\n            ".join(specs)
        cases.append(f"        {command.name})\n            _arguments \\\n            {lines} ;;")
    filled = {"commands": described, "cases": "\n".join(cases)}
    return _fill(ZSH, filled | {key: " ".join(words) for key, words in lists.items()})


def _fish(commands: Sequence[Command], lists: Mapping[str, Sequence[str]]) -> str:
    lines = []
    for command in commands:
        lines.append(f"complete -c {NAME} -n __fish_use_subcommand -a {command.name} -d '{command.help}'")
        seen = f"__fish_seen_subcommand_from {command.name}"
        for option in command.options:
            spelled = " ".join(f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in option.names)
            follows = "" if not option.valued else f" -x -a '{' '.join(option.words)}'" if option.words else " -r -F"
            lines.append(f"complete -c {NAME} -n '{seen}' {spelled}{follows} -d '{option.help}'")
        for place, kind in enumerate(command.kinds):
            compare = "-ge" if command.repeats and place == len(command.kinds) - 1 else "-eq"
            first, *words = kind.split()
            what = (
                f"-a '{' '.join(words)}'"
                if first == "words"
                else "-F"
                if first == "files"
                else f"-a '$__flowbp_ray_{kind}'"
            )
            what += " -F" * (first == "config")
            lines.append(
                f"complete -c {NAME} -n '{seen}; and test (count (commandline -opc)) {compare} {place + 2}' {what}"
            )
    return _fill(FISH, {"lines": "\n".join(lines)} | {key: " ".join(words) for key, words in lists.items()})


def _fill(template: str, filled: Mapping[str, str]) -> str:
    """The template with each @key@ replaced."""
    return re.sub(r"@(\w+)@", lambda found: filled[found[1]], template.lstrip("\n"))


BASH = r"""
# Completes flowbp-ray in bash. Made by: flowbp-ray completion bash
_flowbp_ray() {
    local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" command="${COMP_WORDS[1]}"
    local options="" valued="" kind="" repeats=0 place=0 i
    local -a kinds=()
    COMPREPLY=()
    if (( COMP_CWORD == 1 )); then
        mapfile -t COMPREPLY < <(compgen -W "@commands@ --help" -- "$cur")
        return
    fi
    if [[ $cur == "=" || $prev == "=" ]]; then  # bash takes key=value apart
        [[ $cur == "=" ]] && cur=""
        compopt -o filenames 2> /dev/null
        mapfile -t COMPREPLY < <(compgen -f -- "$cur")
        return
    fi
    case $command in
@cases@
        *) return ;;
    esac
    for (( i = 2; i < COMP_CWORD; i++ )); do
        case ${COMP_WORDS[i]} in
            =) (( i++ )) ;;
            -*) [[ $valued == *" ${COMP_WORDS[i]} "* ]] && (( i++ )) ;;
            *) (( place++ )) ;;
        esac
    done
    if [[ $valued == *" $prev "* ]]; then
        kind="files"
        case "$command $prev" in
@values@
        esac
    elif [[ $cur == -* ]]; then
        kind="words $options"
    elif (( place < ${#kinds[@]} )); then
        kind="${kinds[place]}"
    elif (( repeats )); then
        kind="${kinds[${#kinds[@]}-1]}"
    fi
    case $kind in
        words*) mapfile -t COMPREPLY < <(compgen -W "${kind#words }" -- "$cur") ;;
        overrides) mapfile -t COMPREPLY < <(compgen -W "@overrides@" -- "$cur") ;;
        section) mapfile -t COMPREPLY < <(compgen -W "@section@" -- "$cur") ;;
        config) mapfile -t COMPREPLY < <(compgen -W "@config@" -- "$cur"; compgen -f -- "$cur") ;;
        files) mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
    esac
    case $kind in files | config) compopt -o filenames 2> /dev/null ;; esac
    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2> /dev/null
    return 0
}
complete -F _flowbp_ray flowbp-ray
"""

ZSH = r"""
#compdef flowbp-ray
# Completes flowbp-ray in zsh. Made by: flowbp-ray completion zsh
_flowbp_ray_config() {
    local -a names=(@config@)
    compadd -a names
    _files
}
_flowbp_ray_overrides() {
    local -a names=(@overrides@)
    if compset -P '*='; then _files; else compadd -S '' -a names; fi
}
_flowbp_ray_section() {
    local -a names=(@section@)
    compadd -a names
}
_flowbp_ray() {
    local -a commands=(
@commands@
    )
    if (( CURRENT == 2 )); then
        _describe -t commands command commands
        return
    fi
    local name=$words[2]
    shift words
    (( CURRENT-- ))
    case $name in
@cases@
    esac
}
if [[ $funcstack[1] == _flowbp_ray ]]; then _flowbp_ray "$@"; else compdef _flowbp_ray flowbp-ray; fi
"""

FISH = r"""
# Completes flowbp-ray in fish. Made by: flowbp-ray completion fish
set -g __flowbp_ray_config @config@
set -g __flowbp_ray_overrides @overrides@
set -g __flowbp_ray_section @section@
complete -c flowbp-ray -f
@lines@
"""
