"""Imports go one way (DESIGN): read from the source, not from what happens to be loaded."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.paths import ROOT

HEAVY = {"ray", "deepspeed", "diffusers", "transformers", "actors", "wandb", "peft"}


def imported(path: Path) -> set[str]:
    """Dotted names of all absolute imports in a file, also those inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, folder
    return found


def test_surrogate_needs_torch_only() -> None:
    for path in files("flowbp_ray/surrogate"):
        assert not roots(path) & HEAVY, path
        assert not any(name.startswith("flowbp_ray.") and ".surrogate" not in name for name in imported(path)), path


def test_only_driver_and_cli_know_ray() -> None:
    for path in files("flowbp_ray"):
        if path.name not in ("driver.py", "cli.py"):
            assert not roots(path) & {"ray", "actors"}, path


def test_backbones_and_rewards_do_not_know_the_learner() -> None:
    upper = {f"flowbp_ray.{name}" for name in ("learner", "sampling", "scoring", "driver", "engine")}
    for folder in ("flowbp_ray/backbones", "flowbp_ray/rewards"):
        for path in files(folder):
            assert not imported(path) & upper, path


def test_the_learner_knows_neither_reward_nor_decoder() -> None:
    for name in ("learner", "engine", "weights", "sampling", "rollouts"):
        assert not any(n.startswith("flowbp_ray.rewards") for n in imported(ROOT / f"flowbp_ray/{name}.py")), name


def test_files_are_short() -> None:
    for folder in ("flowbp_ray", "actors", "benchmarks"):
        for path in files(folder):
            assert path.read_text().count("\n") <= 300, path
