"""`make_shapes all`: the order of its stages, and where it goes on. A stage is replaced by a note of its name."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.make_shapes import __main__ as command
from benchmarks.make_shapes import detector_report
from flowbp_ray.rewards.shapes_detector import ShapesDetector
from flowbp_ray.shapes.text import load_models


def test_all_goes_on_after_the_last_stage_that_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called, fails = list[str](), {"looks"}

    def stage(name: str) -> SimpleNamespace:
        short = name.removeprefix("benchmarks.make_shapes.")

        def main(args: object) -> None:
            called.append(short)
            if short in fails:
                raise OSError("disk full")

        return SimpleNamespace(main=main)

    monkeypatch.setattr(command.importlib, "import_module", stage)

    def run(stage: str, *more: str) -> list[str]:
        called.clear()
        monkeypatch.setattr(sys, "argv", ["make_shapes", stage, "--work", str(tmp_path), *more])
        command.main()
        return list(called)

    with pytest.raises(OSError, match="disk full"):
        run("all")
    assert called == ["world", "vae", "decoder", "base", "looks"]
    fails.clear()
    assert run("all") == ["looks", "mixture", "rewards", "preference", "detector", "card"]
    assert len(run("all")) == 10  # what is whole is made again
    fails.add("card")
    with pytest.raises(OSError, match="disk full"):
        run("all")
    assert run("mixture") == ["mixture"]
    fails.clear()
    assert run("all") == ["rewards", "preference", "detector", "card"]  # which were made from another mixture
    fails.add("card")
    with pytest.raises(OSError, match="disk full"):
        run("all")
    fails.clear()
    assert len(run("all", "--steps", "2")) == 10  # another length is another run


def test_each_stage_is_a_module_with_a_main() -> None:
    for module in command.STAGES.values():
        assert callable(importlib.import_module(f"benchmarks.make_shapes.{module}").main)


def test_a_try_of_few_steps_calibrates_its_detector_on_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """After two steps the decoder draws nothing that the verifier reads."""
    monkeypatch.setattr(detector_report, "redraw", lambda rng, vae, images: np.full_like(images, 255))
    found = detector_report.calibrate(ShapesDetector(), load_models().vae)
    assert set(found) == {"low", "high"} and all(math.isfinite(value) for value in found.values())
