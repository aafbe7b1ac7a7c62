"""One reward server for all tests that only ask it something."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.remote.servers import BOTH, Server, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Both shapes rewards, four rows at once, on the small configuration."""
    with serving(tmp_path_factory.mktemp("server"), BOTH, options=("--max-rows", "4")) as running:
        yield running
