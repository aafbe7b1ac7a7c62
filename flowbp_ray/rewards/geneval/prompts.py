"""GenEval's prompt file `evaluation_metadata.jsonl`: one JSON object a line, a prompt and what its picture must show.

    {"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}],
     "prompt": "a photo of two clocks"}

An `include` may also hold "color": one of ten, or "position": ["left of", 0], said of the include with that index.
The six tags are single_object, two_object, counting, colors, position and color_attr; others are read as well, and only
`counting` changes anything: its detections need a higher score.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowbp_ray.rewards.geneval.names import COLOURS
from flowbp_ray.utils.addresses import expand
from flowbp_ray.utils.text_files import read_lines

RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Wanted:
    """At least `count` of a class; the surest `count` of them in this colour and at this place, where one is named.

    position: (relation, index of the earlier `Wanted` that it is relative to).
    """

    noun: str
    count: int
    colour: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Unwanted:
    """Fewer than `count` of a class."""

    noun: str
    count: int


@dataclass(frozen=True)
class Task:
    """A prompt and its conditions, all of which must hold."""

    prompt: str
    tag: str
    include: tuple[Wanted, ...]
    exclude: tuple[Unwanted, ...] = ()

    @property
    def nouns(self) -> set[str]:
        """Every class that is looked for."""
        return {wanted.noun for wanted in self.include} | {unwanted.noun for unwanted in self.exclude}


def load(path: str | Path) -> dict[str, Task]:
    """Prompt text -> what to check. Raises ValueError with the line's number for what is not in the format."""
    tasks: dict[str, Task] = {}
    for number, line in enumerate(read_lines(Path(expand(str(path))), f"GenEval's prompts {path}"), 1):
        if not line.strip():
            continue
        try:
            task = parse(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"GenEval's prompts {path}, line {number}: {error}") from error
        if tasks.setdefault(task.prompt, task) != task:
            raise ValueError(
                f"GenEval's prompts {path}, line {number}: {task.prompt!r:.100} is there twice and differs"
            )
    if not tasks:
        raise ValueError(f"GenEval's prompts {path} hold no prompt; give a file like its evaluation_metadata.jsonl")
    return tasks


def parse(row: Any) -> Task:
    """One line of the file as a value."""
    if not isinstance(row, Mapping) or not isinstance(row.get("prompt"), str):
        raise ValueError(f"an object with a text under 'prompt' is needed, not {row!r:.80}")
    if not isinstance(row.get("tag"), str):
        raise ValueError(f'{row["prompt"]!r:.100} has no tag; write which task it is, such as "tag": "counting"')
    listed = {key: row.get(key) or () for key in ("include", "exclude")}
    if not all(isinstance(parts, list | tuple) for parts in listed.values()):
        raise ValueError(f"include and exclude must be lists of objects in {row['prompt']!r:.100}")
    include = tuple(_wanted(part, i) for i, part in enumerate(listed["include"]))
    exclude = tuple(Unwanted(*_noun_and_count(part)) for part in listed["exclude"])
    if not include and not exclude:
        raise ValueError(f"{row['prompt']!r:.100} asks for nothing; list objects under 'include'")
    return Task(row["prompt"], row["tag"], include, exclude)


def _wanted(part: Any, index: int) -> Wanted:
    noun, count = _noun_and_count(part)
    colour, position = part.get("color"), part.get("position")
    if colour is not None and colour not in COLOURS:
        raise ValueError(f"the colour {colour!r} of {noun!r} is none of {', '.join(COLOURS)}")
    if position is None:
        return Wanted(noun, count, colour)
    if not isinstance(position, list | tuple) or len(position) != 2 or position[0] not in RELATIONS:
        allowed = " | ".join(RELATIONS)
        raise ValueError(f"position of {noun!r} must be [{allowed}, index of an include], not {position!r}")
    relation, target = position
    if type(target) is not int or not 0 <= target < index:
        raise ValueError(f"position of {noun!r} must point at an earlier include (0 to {index - 1}), not {target!r}")
    return Wanted(noun, count, colour, (relation, target))


def _noun_and_count(part: Any) -> tuple[str, int]:
    if not isinstance(part, Mapping) or not isinstance(part.get("class"), str):
        raise ValueError(f"an object with a text under 'class' is needed, not {part!r:.80}")
    count = part.get("count")
    if type(count) is not int or count < 1:
        raise ValueError(f"count of {part['class']!r} must be a whole number from 1, not {count!r}")
    return part["class"], count
