"""The reference pages of the site, read from the code: Markdown by file name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import typer
import yaml

from flowbp_ray import cli
from flowbp_ray.backbones.registry import BACKBONES
from flowbp_ray.config import loading, reference
from flowbp_ray.observability import catalog
from flowbp_ray.rewards import REWARDS, base
from flowbp_ray.surrogate import METHODS
from flowbp_ray.utils.errors import ConfigError

HEADS = {
    "progress": "Where the run is",
    "throughput": "Throughput",
    "time": "Times",
    "idle": "Idleness",
    "queue": "Queues",
    "count": "Processes",
    "drift": "Drift",
    "bytes": "Bytes",
    "reward": "Rewards",
    "loss": "Losses",
    "gradient": "Gradients and the optimizer",
    "sample": "Samples",
    "evaluation": "Evaluations",
}


def pages() -> dict[str, str]:
    """Every generated page by its name below docs/."""
    return {
        "configuration.md": reference.page(),
        "reference/cli.md": command_line(),
        "reference/configs.md": configs(),
        "reference/methods.md": methods(),
        "reference/rewards.md": rewards(),
        "reference/backbones.md": backbones(),
        "reference/metrics.md": metrics(),
    }


def commands() -> dict[str, Any]:
    """The commands of flowbp-ray by name. Their classes are typer's or click's, by typer's version."""
    group: Any = typer.main.get_command(cli.app)
    return dict(group.commands)


def command_line() -> str:
    """One section per command: what it does, how it is called, its arguments and options."""
    lines = [
        "# Command line",
        "",
        "`flowbp-ray COMMAND --help` prints the same on a terminal. What you can mend ends with one line and exit code",
        "2, a run that failed with 1.",
    ]
    for name, command in commands().items():
        lines += ["", f"## {name}", "", *_help(command.help or ""), "", "```text", _usage(name, command), "```"]
        shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
        if shown:
            lines += ["", "| argument or option | default | what |", "|---|---|---|"]
            lines += [_row(parameter) for parameter in shown]
    return "\n".join(lines) + "\n"


def _usage(name: str, command: Any) -> str:
    """The command with its arguments: those in brackets may be left out, `...` stands for more of them."""
    shown = [f"flowbp-ray {name} [OPTIONS]"]
    for parameter in (one for one in command.params if one.param_type_name == "argument"):
        word = parameter.name.upper() + ("..." if parameter.nargs == -1 else "")
        shown.append(word if parameter.required else f"[{word}]")
    return " ".join(shown)


def _help(words: str) -> Iterator[str]:
    """A command's help, its example in a block."""
    text, _, example = inspect.cleandoc(words).partition("Example: ")
    yield text.strip()
    if example:
        yield from ("", "```bash", *(line.strip() for line in example.strip().splitlines()), "```")


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        name = f"`{parameter.name.upper()}`"
    else:
        options = [*parameter.opts, *parameter.secondary_opts]
        name = ", ".join(f"`{option}`" for option in options)
    default = parameter.default
    unset = default is None or default is False or callable(default) or "UNSET" in str(default).upper()
    shown = "required" if parameter.required else "" if unset else f"`{default}`"
    return f"| {name} | {shown} | {_cell(getattr(parameter, 'help', None) or '')} |"


def configs() -> str:
    """The shipped runs, each with the comment at its head."""
    lines = [
        "# Shipped configurations",
        "",
        "`flowbp-ray train NAME` takes any; `extends: NAME.yaml` builds on one.",
        "",
    ]
    lines += ["| name | model | method | what |", "|---|---|---|---|"]
    for file in sorted((loading.shipped() / "runs").glob("*.yaml")):
        about = _cell(" ".join(_comment(file.read_text())))
        try:
            loaded = loading.load(file)
        except ConfigError:  # a part that others extend, which has no model or name of its own
            lines.append(f"| `{file.stem}` | to be extended | | {about} |")
        else:
            method = (loaded.method or {}).get("name", "")
            lines.append(f"| `{file.stem}` | `{loaded.backbone.name}` | {f'`{method}`' if method else ''} | {about} |")
    return "\n".join(lines) + "\n"


def _comment(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if not line.startswith("#"):
            return
        yield line.removeprefix("#").strip()


def methods() -> str:
    """The named methods: what each is, its arguments, its published settings and its picture."""
    lines = [
        "# Methods",
        "",
        "Each is a point of four axes (target, active nodes, weights, segments) with its modifiers; the axes are in",
        "[configuration](../configuration.md#method), the idea is in [the surrogate](../surrogate.md).",
    ]
    for name, factory in METHODS.items():
        picture = f"![Where the gradient of {name} flows](../figures/{name}.svg)"
        lines += ["", f"## {name}", "", _doc(factory), "", picture, ""]
        lines += ["| argument | default |", "|---|---|"]
        lines += [f"| `{p.name}` | `{_yaml(p.default)}` |" for p in inspect.signature(factory).parameters.values()]
        published = loading.shipped() / "methods" / f"{name}.yaml"
        if published.is_file():
            lines += ["", f"`configs/methods/{name}.yaml`:", "", "```yaml", published.read_text().strip(), "```"]
    return "\n".join(lines) + "\n"


def rewards() -> str:
    """Every registered reward: what it is, whether it has a gradient, its options."""
    lines = [
        "# Rewards",
        "",
        "What to download, ranges, costs and licences are in [rewards](../rewards.md#available-rewards).",
        "`kind: module:Class` names one of your own ([tutorial](../tutorials/own-reward.md)).",
    ]
    for name in REWARDS:
        factory = base.factory(name)
        kind = "a gradient in the pixels" if getattr(factory, "differentiable", True) else "no gradient"
        lines += ["", f"## {name}", "", f"{_doc(factory)}", "", f"It has {kind}.", ""]
        options = [p for p in inspect.signature(factory).parameters.values() if p.name != "device"]
        if options:
            lines += ["| option | default |", "|---|---|"]
            lines += [f"| `{p.name}` | {_default(p)} |" for p in options]
        else:
            lines.append("It has no options.")
    return "\n".join(lines) + "\n"


def backbones() -> str:
    """Every model family, and the settings that its shipped part holds."""
    lines = ["# Backbones", "", "How to add one: [adding a backbone](../adding-a-backbone.md)."]
    for name, family in BACKBONES.items():
        lines += ["", f"## {name}", "", _doc(family)]
        part = loading.shipped() / "backbones" / f"{name}.yaml"
        if part.is_file():
            lines += ["", f"`configs/backbones/{name}.yaml`:", "", "```yaml", part.read_text().strip(), "```"]
    return "\n".join(lines) + "\n"


def metrics() -> str:
    """Every number of a run by group: its key in metrics.jsonl, its unit, its name in Prometheus."""
    lines = [
        "# Metrics",
        "",
        "What a run writes to `metrics.jsonl` and sends to trackers, and what Ray exports;",
        "[watching a run](../observing.md) says how to look at them. In a key, `*` stands for the value of the tag.",
    ]
    for group in dict.fromkeys(metric.group for metric in catalog.TABLE):
        lines += ["", f"## {HEADS.get(group, group.capitalize())}", ""]
        lines += ["| key | unit | tag | Prometheus | what |", "|---|---|---|---|---|"]
        for metric in (one for one in catalog.TABLE if one.group == group):
            about = f"| `{metric.key}` | {metric.unit} | {', '.join(metric.tags)} | `{metric.scraped}` |"
            lines.append(f"{about} {_cell(metric.meaning)} |")
    return "\n".join(lines) + "\n"


def _doc(documented: Any) -> str:
    """A docstring, with that of its module where it refers to it."""
    said, module = inspect.getdoc(documented) or "", inspect.getmodule(documented)
    if "(module docstring)" in said and module is not None:
        said = f"{said.replace(' (module docstring)', '')}\n\n{inspect.cleandoc(module.__doc__ or '')}"
    return said.strip()


def _default(parameter: inspect.Parameter) -> str:
    return "required" if parameter.default is inspect.Parameter.empty else f"`{_yaml(parameter.default)}`"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def _cell(words: str) -> str:
    return " ".join(words.split()).replace("|", "\\|")
