"""What every configuration key means: type, default, constraint and description, read from the models themselves."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

import yaml

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.surrogate import METHODS, Method
from flowbp_ray.utils.errors import nearest

WORDS = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "null": "null",
    "object": "mapping",
}
BOUNDS = {"minimum": ">= {:g}", "exclusiveMinimum": "> {:g}", "maximum": "<= {:g}", "exclusiveMaximum": "< {:g}"}
BOUNDS |= {"minLength": "length >= {}", "minItems": "entries >= {}", "minProperties": "entries >= {}"}
BOUNDS |= {"pattern": "matches `{}`"}

AXES = {
    "target": "What the reward sees.",
    "active": "Which nodes of the trajectory get a gradient.",
    "weights": "How a segment integrates the velocities of its nodes. An anchor below 1 blends the first of two "
    "segments with its Euler leap.",
    "segments": "Where the segments begin and end: one, or two that meet at a junction j.",
    "coupling": "Factor, 0 to 1, of the gradient that reaches the first of two segments through the junction. 0: none.",
    "rescale": "How much the active nodes' gains make up for the part of the integral that is cached. 0: nothing, "
    "1: all of it.",
    "tail_ratio": "Share, above 0 and up to 1, of the nodes that can be active; they are the last ones. 1: all.",
    "similarity": "Weights samples by how near their leaps come to the cached states. null: all weigh the same.",
    "draws": "per_batch: all samples of a step share the drawn nodes. per_sample: each sample has its own.",
}
"""The fields of `Method`, which the surrogate states as types and equations."""

NOTATION = (
    "Arguments stand at their defaults, `...` has none. Of a named method alpha is the coupling, tail the tail_ratio, "
    "late_bias the bias of active, stop the ratio of target and tau that of similarity; the others are called as in "
    "the axes. Node 0 is noise and N the image; a reversed index (k_rev, j_rev) counts from N; n is the number of "
    "nodes, W of those at the end that can be active, and s = n − W is the first of them."
)

HEAD = """# Configuration
Every key of a run's YAML. The page is generated: `flowbp-ray config-reference --markdown > docs/configuration.md`.
`flowbp-ray config-reference learners` prints a part of it on the terminal.

A key that is written with dots (`learners.optimizer.lr=2e-5`) can be given on the command line after the configuration.
`[i]` stands for the number of a list's entry, from 0: `rewards.terms[0].weight=2`. A *section* has keys of its own.
"""


@dataclasses.dataclass(frozen=True)
class Key:
    """One key. default: as YAML, or "required"; "" for a section with defaults. kind: of the template it belongs to."""

    name: str
    type: str
    default: str
    constraint: str
    description: str
    kind: str = ""

    @property
    def title(self) -> str:
        """The dotted name, with the kind that has it where only some have."""
        return f"{self.name} (kind: {self.kind})" if self.kind else self.name

    @property
    def facts(self) -> str:
        """Type, constraint and default in one line."""
        default = f"default {self.default}" if self.default not in ("", "required") else self.default
        return ", ".join(part for part in (self.type, self.constraint, default) if part)


def keys() -> list[Key]:
    """All keys of a run's configuration, in the order of the models."""
    schema = RunConfig.model_json_schema()
    return list(_keys(schema, schema["$defs"], "", ""))


def text(section: str = "") -> str:
    """The keys of `section`, a dotted prefix ("" is everything), for a terminal.

    Raises ValueError for a section that does not exist. What is below `method` is shown together.
    """
    if section.startswith("method."):
        _check_method_key(section.split(".")[1])
        section = "method"
    found = [key for key in keys() if _below(key.name, section)]
    if not found:
        raise ValueError(nearest(section, sorted({_plain(key.name) for key in keys()}), "key"))
    blocks = []
    for key in found:
        blocks.append(f"{key.title}\n{_indented(key.facts)}\n{_indented(key.description)}\n")
        if key.name == "method":
            blocks += [f"{_indented(NOTATION)}\n"]
            blocks += [f"{name}\n{_indented(what)}\n" for name, what in (*_named_methods(), *_axes())]
    return "\n".join(blocks)


def _check_method_key(key: str) -> None:
    """Raises ValueError unless `key` is an axis of a method or an argument of a named one."""
    arguments = {name for factory in METHODS.values() for name in inspect.signature(factory).parameters}
    known = {"name", *(field.name for field in dataclasses.fields(Method)), *arguments}
    if key not in known:
        raise ValueError(nearest(key, sorted(known), "key in method"))


def page() -> str:
    """The Markdown page docs/configuration.md."""
    schema = RunConfig.model_json_schema()
    found = keys()
    sections = [key for key in found if "." not in key.name and _refs(schema["properties"][key.name])]
    apart = {key.name for key in sections} | {"method"}
    parts = [HEAD, "## Top level\n", _table([key for key in found if "." not in key.name])]
    for key in (key for key in found if key.name in apart):
        if key.name == "method":
            parts += ["## method\n", _method_page()]
            continue
        ref = _refs(schema["properties"][key.name])[0][0]
        parts += [f"## {key.name}\n", " ".join(schema["$defs"][ref]["description"].split()) + "\n"]
        parts.append(_table([k for k in found if k is not key and _below(k.name, key.name)]))
    return "\n".join(parts)


def _keys(model: dict[str, Any], models: dict[str, Any], prefix: str, kind: str) -> Iterator[Key]:
    """The keys of one model's JSON schema and of the models below it."""
    for name, node in model["properties"].items():
        below = _refs(node)
        if name in model.get("required", ()):
            default = "required"
        else:
            default = "" if below and isinstance(node["default"], dict) else _yaml(node["default"])
        described = " ".join(node.get("description", "").split())
        yield Key(prefix + name, _type(node), default, _constraint(node), described, kind)
        for ref, suffix, its_kind in below:
            yield from _keys(models[ref], models, f"{prefix}{name}{suffix}.", its_kind or kind)


def _refs(node: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The models that a key may hold: name, how an entry of it is addressed, and the kind that chooses it."""
    if "discriminator" in node:
        return [(_name(ref), "", kind) for kind, ref in node["discriminator"]["mapping"].items()]
    if "$ref" in node:
        return [(_name(node["$ref"]), "", "")]
    if "items" in node:
        return [(name, f"[i]{suffix}", kind) for name, suffix, kind in _refs(node["items"])]
    return [found for option in node.get("anyOf", ()) for found in _refs(option)]


def _name(ref: str) -> str:
    return ref.rpartition("/")[2]


def _type(node: dict[str, Any]) -> str:
    """In plain words."""
    if "anyOf" in node:
        return " or ".join(_type(option) for option in node["anyOf"])
    if "$ref" in node or "discriminator" in node:
        return "section"
    if "enum" in node:
        return "one of " + " | ".join(_yaml(value) for value in node["enum"])
    if "const" in node:
        return _yaml(node["const"])
    if "prefixItems" in node:
        return f"list of {len(node['prefixItems'])} {_type(node['prefixItems'][0])}s"
    if "items" in node:
        return f"list of {_type(node['items'])}s"
    if isinstance(node.get("additionalProperties"), dict):
        return f"mapping from name to {_type(node['additionalProperties'])}"
    return WORDS[node["type"]]


def _constraint(node: dict[str, Any]) -> str:
    """Bounds of the value, and of each of several."""
    found = [_constraint(option) for option in node.get("anyOf", ())]
    fixed = "prefixItems" in node  # whose number of entries is part of the type
    found += [form.format(node[key]) for key, form in BOUNDS.items() if key in node and not fixed]
    several = [node[key] for key in ("items", "additionalProperties") if isinstance(node.get(key), dict)]
    found += [f"each {bound}" for each in [*several, *node.get("prefixItems", ())[:1]] if (bound := _constraint(each))]
    return ", ".join(bound for bound in found if bound)


def _yaml(value: Any) -> str:
    """A value as it is written in YAML, on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


def _named_methods() -> list[tuple[str, str]]:
    """`method.name` of the seven, with arguments and their defaults."""
    return [
        (_spelled({"name": name}, inspect.signature(factory).parameters.values()), _meaning(factory))
        for name, factory in METHODS.items()
    ]


def _axes() -> list[tuple[str, str]]:
    """Each axis with its default, and each of its kinds with its arguments."""
    found, hints = [], typing.get_type_hints(Method)
    for field in dataclasses.fields(Method):
        own = _yaml(getattr(field.default, "kind", field.default))
        found.append((f"method.{field.name}", f"{AXES[field.name]} Default: {own}."))
        for option in typing.get_args(hints[field.name]) or (hints[field.name],):
            if dataclasses.is_dataclass(option):
                values = {f.name: f for f in dataclasses.fields(option)}
                kind = {"kind": values.pop("kind").default} if "kind" in values else {}
                found.append((f"method.{field.name}: {_spelled(kind, values.values())}", _meaning(option)))
    return found


def _spelled(first: dict[str, Any], arguments: Any) -> str:
    """{name: refl, last: 11}: what is fixed, then arguments (of a function or a dataclass) at their defaults."""
    missing = (inspect.Parameter.empty, dataclasses.MISSING)
    rest = {a.name: "..." if a.default in missing else _yaml(a.default) for a in arguments}
    return "{" + ", ".join(f"{name}: {value}" for name, value in (first | rest).items()) + "}"


def _meaning(documented: Any) -> str:
    """A docstring on one line."""
    return " ".join((inspect.getdoc(documented) or "").split())


def _method_page() -> str:
    lines = ["A named method:\n", "| write | what it is |", "|---|---|"]
    lines += [f"| `{_cell(name)}` | {_cell(what)} |" for name, what in _named_methods()]
    lines += ["\nBeside a name any axis may be replaced. Without a name the axes spell a method out, and what is not"]
    lines += ["written has its default ([adding a method](adding-a-method.md)).\n", textwrap.fill(NOTATION, 120) + "\n"]
    lines += ["| axis, and the kinds of it | what it is |", "|---|---|"]
    lines += [f"| `{_cell(name)}` | {_cell(what)} |" for name, what in _axes()]
    return "\n".join(lines) + "\n"


def _table(rows: list[Key]) -> str:
    lines = ["| key | type | default | what |", "|---|---|---|---|"]
    for key in rows:
        default = f"`{key.default}`" if key.default not in ("", "required") else key.default
        kinds = ", ".join(part for part in (key.type, key.constraint) if part)
        lines.append("| " + " | ".join(_cell(c) for c in (f"`{key.title}`", kinds, default, key.description)) + " |")
    return "\n".join(lines) + "\n"


def _cell(words: str) -> str:
    return words.replace("|", "\\|")


def _below(name: str, section: str) -> bool:
    """Whether a key is `section` or belongs to it, however entries of lists are numbered."""
    name, section = _plain(name), _plain(section)
    return not section or name == section or name.startswith(section + ".")


def _plain(name: str) -> str:
    """A dotted name without the numbers of entries."""
    return re.sub(r"\[\w*\]|\.\d+(?=\.|$)", "", name)


def _indented(words: str) -> str:
    return textwrap.indent(textwrap.fill(words, 96, break_on_hyphens=False, break_long_words=False), "    ")
