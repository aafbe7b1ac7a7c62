"""What a file of the package may look like. The layers are contracts in pyproject.toml, which `make lint` checks."""

from __future__ import annotations

import importlib
import sys

from tests.paths import ROOT

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")


def test_files_are_short() -> None:
    files = [path for folder in ("flowbp_ray", "actors", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 200
    assert [path for path in files if path.read_text().count("\n") > 300] == []


def test_every_module_and_wing_has_its_layer() -> None:
    """A contract of layers says nothing of a module that it does not name; the one of Ray lists all but these."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(c for c in contracts if c["type"] == "layers")
    no_ray = next(c for c in contracts if c["type"] == "forbidden" and c["forbidden_modules"] == ["ray"])
    named = {name.strip() for line in layers["layers"] for name in line.split("|")}
    package = ROOT / "flowbp_ray"
    there = {f"flowbp_ray.{p.stem}" for p in package.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    there -= {"flowbp_ray.__init__", "flowbp_ray.__main__"}
    assert named == there | {"benchmarks", "actors"}
    with_ray = {f"flowbp_ray.{name}" for name in ("cli", "cli_measuring", "bench", "driver", "evaluate")}
    assert set(no_ray["source_modules"]) == there - with_ray
