"""The code in the documents runs, and does what the text says."""

from __future__ import annotations

import re
from typing import Any

import torch
import yaml
from pydantic import TypeAdapter

from flowbp_ray.surrogate import METHODS, Method, Plan
from tests.paths import ROOT

DOCS = ROOT / "docs"


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / name).read_text(), flags=re.DOTALL | re.MULTILINE)


def run(name: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in blocks(name, "python"):
        exec(compile(block, name, "exec"), names)
    return names


def test_adding_a_method(capsys: Any) -> None:
    definition = blocks("adding-a-method.md", "python")[0]
    assert len([line for line in definition.splitlines() if line.strip()]) <= 10
    try:
        names = run("adding-a-method.md")
    finally:
        METHODS.pop("three_leaps", None)
    plan: Plan = names["plan"]
    assert f"{len(plan.terms())} VJPs" in capsys.readouterr().out
    assert len(plan.terms()) in (2, 3) and any(term.is_junction for term in plan.terms())
    [spelled] = blocks("adding-a-method.md", "yaml")
    assert TypeAdapter(Method).validate_python(yaml.safe_load(spelled)) == names["method"]


def test_the_library_without_ray() -> None:
    torch.manual_seed(0)
    names = run("library.md")
    assert names["history"][-1] > names["history"][0] + 0.5
    assert names["report"].forwards == 2 * 2
