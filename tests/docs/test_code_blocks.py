"""What stands in the documents' fenced blocks is read by the code that would read it: YAML, command lines, Python."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from benchmarks.site.reference import commands
from flowbp_ray.comparing.suite import Suite
from flowbp_ray.config import loading
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.surrogate import Method
from tests.docs.pages import Block, blocks

SHIPPED = {path.stem for path in (loading.shipped() / "runs").glob("*.yaml")}
OVERRIDDEN = {"train", "plan", "doctor", "encode", "eval", "serve-reward", "bench"}
YAML, PYTHON, SHELL = blocks("yaml"), blocks("python"), blocks("", "bash", "console")


def ids(found: list[Any]) -> list[str]:
    return [one.where if isinstance(one, Block) else one[0] for one in found]


def test_there_are_blocks_to_look_at() -> None:
    assert len(YAML) > 20 and len(PYTHON) > 7 and len(COMMANDS) > 70


@pytest.mark.parametrize("block", YAML, ids=ids(YAML))
def test_yaml_is_a_configuration_or_a_part_of_one(block: Block, tmp_path: Path) -> None:
    tree = yaml.safe_load(block.text)
    if "apiVersion" in tree:
        return
    if {"rows", "seeds"} <= set(tree):
        Suite.model_validate(tree)
    elif set(tree) <= set(Method.__dataclass_fields__):
        TypeAdapter(Method).validate_python(tree)
    else:
        assert set(tree) <= {"extends", *RunConfig.model_fields}
        path = tmp_path / "my.yaml"
        (tmp_path / "whole.yaml").write_text(yaml.safe_dump(_whole(tree)))
        path.write_text(block.text if "extends" in tree else f"extends: whole.yaml\n{block.text}")
        loading.load(path)


def _whole(tree: dict[str, Any]) -> dict[str, Any]:
    """A run that the part may stand in: of its kind of rewards, with a large batch, measuring what is guarded."""
    terms = (tree.get("rewards") or {}).get("terms") or [{}]
    learned = all(term.get("gradient") == "none" for term in terms if isinstance(term, dict))
    measured = {"shapes_clip_heldout", "verifier", "quality", *(tree.get("guard") or {}).get("metrics", ())}
    monitors = [{"name": name, "kind": "shapes_clip_heldout"} for name in sorted(measured - {"verifier", "quality"})]
    whole = {
        "extends": "shapes_nft.yaml" if learned else "shapes_flowbp_sparse.yaml",
        "rewards": {"monitors": monitors},
    }
    images = 8 if learned else 1
    data = {"prompts_per_step": 256 // images, "images_per_prompt": images, "rollout_batch": 16}
    return whole | {"data": data, "learners": {"micro_batch": 16}, "evaluation": {"every": 20}}


@pytest.mark.parametrize("block", PYTHON, ids=ids(PYTHON))
def test_python_compiles(block: Block) -> None:
    compile(block.text, block.where, "exec")


COMMAND = re.compile(
    r"(\$ )?([A-Z_]+=\S+ )*(\S*flowbp-ray|ray job submit .* -- python -m flowbp_ray|python -m flowbp_ray) [a-z]"
)


def lines_of(block: Block) -> list[str]:
    """The command lines of a block: continued ones joined, prompts taken off, output left out."""
    joined = re.sub(r"\s*\\\n\s*", " ", block.text).splitlines()
    return [line.removeprefix("$ ") for line in joined if COMMAND.match(line)]


def words_of(line: str) -> list[str]:
    """The words after `flowbp-ray`, up to a comment, a pipe or the next command."""
    words = shlex.split(line, comments=True)
    end = next((i for i, word in enumerate(words) if word in ("&&", "|", "&", ";", ">")), len(words))
    words = words[:end]
    start = next(i for i, word in enumerate(words) if word.endswith(("flowbp-ray", "flowbp_ray")))
    return words[start + 1 :]


COMMANDS = [(f"{block.where} {line[:60]}", line) for block in SHELL for line in lines_of(block)]


@pytest.mark.parametrize("where_line", COMMANDS, ids=ids(COMMANDS))
def test_a_command_line_is_understood(where_line: tuple[str, str]) -> None:
    """By the real parser; where it names a shipped configuration, its overrides are loaded with it."""
    name, *arguments = words_of(where_line[1])
    known = commands()
    assert name in known
    context = known[name].make_context(name, arguments)
    given = context.params.get("config") or context.params.get("target")
    if name in OVERRIDDEN and Path(str(given)).stem in SHIPPED:
        loading.load(given, context.params.get("overrides") or [])
    elif name in OVERRIDDEN:
        _check_keys(context.params.get("overrides") or [])


def _check_keys(overrides: list[str]) -> None:
    """Overrides of a configuration that is the reader's own: their keys are looked up in the reference."""
    from flowbp_ray.config import reference

    for override in overrides:
        reference.text(override.partition("=")[0])
