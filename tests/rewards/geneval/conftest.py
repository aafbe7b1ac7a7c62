"""The folders are made once: building and saving them takes longer than most tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rewards.geneval import tiny


@pytest.fixture(scope="session")
def mask2former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.mask2former(tmp_path_factory.mktemp("mask2former"))


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def owlvit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.owl(tmp_path_factory.mktemp("owlvit"), "owlvit")


@pytest.fixture(scope="session")
def owlv2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.owl(tmp_path_factory.mktemp("owlv2"), "owlv2")
