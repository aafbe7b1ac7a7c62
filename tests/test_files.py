"""What a file of the package may look like. The layers are contracts in pyproject.toml, which `make lint` checks."""

from __future__ import annotations

from tests.paths import ROOT


def test_files_are_short() -> None:
    files = [path for folder in ("flowbp_ray", "actors", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 200
    assert [path for path in files if path.read_text().count("\n") > 300] == []
