"""The wheel: the same bytes from two builds, whole, and enough by itself to find models, prompts and configurations."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from flowbp_ray.config import loading
from tests.paths import ROOT

DIST = importlib.util.spec_from_file_location("dist", ROOT / ".ci" / "dist.py")
assert DIST is not None and DIST.loader is not None
dist = importlib.util.module_from_spec(DIST)
DIST.loader.exec_module(dist)

BUILD = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"


def built(folder: Path, names: list[str]) -> Path:
    """A wheel of the tracked files, by the build backend that is installed: nothing is downloaded."""
    source = dist.copied(names, folder / "source")
    (folder / "out").mkdir()
    environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}
    subprocess.run([sys.executable, "-c", BUILD, str(folder / "out")], cwd=source, env=environment, check=True,
                   capture_output=True)  # fmt: skip
    (wheel,) = (folder / "out").iterdir()
    return wheel


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("no git here: what belongs into the wheel is what git tracks")
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the build backend setuptools is not installed: make dist builds with one of its own")
    if int(version.split(".")[0]) < 77:
        pytest.skip(f"setuptools {version} is older than pyproject.toml asks for: make dist builds with one of its own")
    names = dist.tracked()
    wanted = [name for name in names if name.split("/")[0] in dist.PACKAGES or "/" not in name]
    return built(tmp_path_factory.mktemp("one"), wanted), built(tmp_path_factory.mktemp("two"), wanted)


def test_two_builds_are_the_same_bytes(wheels: tuple[Path, Path]) -> None:
    assert wheels[0].read_bytes() == wheels[1].read_bytes()


def test_the_wheel_has_every_tracked_file_of_the_packages(wheels: tuple[Path, Path]) -> None:
    dist.check_contents(wheels[0], dist.tracked())
    held = zipfile.ZipFile(wheels[0]).namelist()
    assert "flowbp_ray/shapes/data/model/transformer/diffusion_pytorch_model.safetensors" in held
    assert "actors/sampler.py" in held and "configs/runs/shapes_demo.yaml" in held


CHECK = """
import pathlib, sys, torch
import actors.sampler, benchmarks.demo, configs, flowbp_ray
from flowbp_ray.backbones.registry import build_backbone
from flowbp_ray.config import loading
from flowbp_ray.prompt_files import load
from flowbp_ray.rewards.base import build, check

home = pathlib.Path(sys.argv[1])
for package in (actors, benchmarks, configs, flowbp_ray):
    assert home in pathlib.Path(next(iter(package.__path__))).parents, package
assert not list(pathlib.Path().iterdir())
for name in sys.argv[2:]:
    loading.load(name)
demo = loading.load("shapes_demo", ["steps=1"])
assert len(load(demo.data.prompts)) > 2000
build_backbone(demo.backbone).load_transformer(torch.float32)
for term in demo.rewards.all:
    check(term.factory, term.options)
    build(term.factory, **term.options)
print("found")
"""


@pytest.mark.slow
def test_an_unpacked_wheel_finds_all_it_needs_from_an_empty_folder(wheels: tuple[Path, Path], tmp_path: Path) -> None:
    """As installed it would: none of the repository is on the path, and every shipped run loads by its name."""
    home, empty = tmp_path / "site-packages", tmp_path / "empty"
    zipfile.ZipFile(wheels[0]).extractall(home)
    empty.mkdir()
    names = [file.stem for file in (loading.shipped() / "runs").glob("*.yaml") if not file.stem.endswith("_base")]
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-c", CHECK, str(home), *sorted(names)]
    done = subprocess.run(
        command, cwd=empty, env=os.environ | {"PYTHONPATH": str(home)}, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() == "found", done.stdout + done.stderr
