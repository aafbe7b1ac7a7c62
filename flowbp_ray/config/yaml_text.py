"""YAML as configurations are written in it: what looks like a date or a time is text, and a key is there once.

YAML 1.1, which PyYAML reads, knows more kinds of scalars than a configuration needs. `name: 2025-01-01` would be a
date, `12:30` the number 750 and `seed: 010` the number 8; `1e-4`, which has no point, would be text.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

INTEGER = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$")
FLOAT = re.compile(
    r"^[-+]?(?:(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
)
OTHERS = ("timestamp", "int", "float")
DEEPEST = 100  # levels of lists and mappings


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars above; a key that is there twice is refused."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=f"more than {DEEPEST} levels of nesting", problem_mark=mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        if isinstance(node, yaml.MappingNode):
            seen: set[Hashable] = set()
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    continue
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key.start_mark)
                if key.value in seen:
                    problem = f"key {key.value!r} is there twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Puts into quotes what this loader, or any other of YAML 1.1, would take for something else than text."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in found if not tag.endswith(OTHERS)]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for handler in (Loader, Dumper):
    handler.add_implicit_resolver("tag:yaml.org,2002:int", INTEGER, list("-+0123456789"))
    handler.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def parse(text: str) -> Any:
    """The value that a YAML text states. Raises ValueError, one line with the line's number, where it is not YAML."""
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}: "
        problem = " ".join(f"{error.context or ''} {error.problem or ''}".split())
        raise ValueError(f"{where}{problem}; {_advice(problem)}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{' '.join(str(error).split())}; remove the character") from error


ADVICE = {
    "there twice": "keep one of them",
    "another document": "keep one document in a file",
    "\\t": "indent with spaces, not with tabs",
    "block end": "indent the keys of a section alike, and put text with special characters into quotes",
    "mapping values": "indent the keys of a section alike, and put text with a colon into quotes",
    "levels of nesting": "write fewer",
    "expected ':'": "write key: value, with a space after the colon",
}
"""What to do about a problem of YAML, by words in it."""


def _advice(problem: str) -> str:
    found = next((advice for words, advice in ADVICE.items() if words in problem), None)
    return found or "put text with special characters into quotes"


def dump(plain: dict[str, Any]) -> str:
    """YAML that `parse` reads back to the same value."""
    text: str = yaml.dump(plain, Dumper=Dumper, sort_keys=False)
    return text


def parse_value(text: str) -> Any:
    """The value of an override `key=value`: YAML, but plain text keeps a ` #` and a `: `, as paths may have them.

    Raises ValueError where a list, a mapping or a quoted text is not YAML.
    """
    stripped = text.strip()
    if not stripped:
        return None
    if stripped[0] in "[{\"'":
        return parse(text)
    if " #" in text or ": " in text or text.endswith(":") or "\n" in text or stripped[0] in "#&*!|>%@`-?,]}:":
        return _number(stripped)
    return parse(text)


def _number(text: str) -> Any:
    """A number that begins with a sign, else the text as it is."""
    return parse(text) if INTEGER.match(text) or FLOAT.match(text) else text
