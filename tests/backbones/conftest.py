"""One saved tiny pipeline per family for all tests of this folder; they must not be written to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.backbones import tiny

Saved = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """name -> (folder, the pipeline that was written there)."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = folder, tiny.save(name, folder)
        return made[name]

    return get
