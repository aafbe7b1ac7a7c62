"""Tiny models on disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.backbones import tiny


def only_configs(source: Path, folder: Path) -> Path:
    """A copy of a model folder without a single weight."""
    return Path(shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin")))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """name -> (a tiny model with weights, the same without)."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            whole = tmp_path_factory.mktemp(name) / "whole"
            tiny.save(name, whole)
            made[name] = whole, only_configs(whole, whole.parent / "configs")
        return made[name]

    return get
