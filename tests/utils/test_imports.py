"""What a newcomer sees beside a command's own output: nothing, whatever the libraries find missing at their import."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

import flowbp_ray
from flowbp_ray.utils.imports import LOGGER, without_kernels
from tests.paths import ROOT


def stderr_of(*words: str) -> str:
    """What a process of its own writes to stderr; it must succeed, and nothing quietens the libraries from outside."""
    loud = ("TRANSFORMERS_VERBOSITY", "PYTHONWARNINGS", "DS_ACCELERATOR", "DEEPSPEED_LOG_LEVEL")
    env = {name: value for name, value in os.environ.items() if name not in loud} | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, *words], env=env, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0 and (ran.stdout or words[0] == "-c"), ran.stderr
    return ran.stderr


@pytest.mark.parametrize("command", ["methods", "plan shapes_flowbp_lagrange --gpus 1x24GB"])
def test_a_command_writes_nothing_to_stderr(command: str) -> None:
    assert stderr_of("-m", "flowbp_ray", *command.split()) == ""


def test_a_process_of_a_run_imports_models_in_silence() -> None:
    """Also where it imports them by itself, without the command's own settings, and peft with them."""
    ours = "flowbp_ray.shapes.text, flowbp_ray.backbones.lean, actors.sampler, actors.reward, actors.encoder_process"
    assert stderr_of("-c", f"import {ours}, peft; from diffusers import AutoencoderKL, SD3Transformer2DModel") == ""


def test_only_the_missing_package_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    """By Python's own error for a package that is not there; other reasons and other messages still come."""
    without_kernels()
    logger, said = logging.getLogger(LOGGER), "Failed to load CPU gemm_4bit_forward from kernels-community: %s."
    assert flowbp_ray.__version__ and len(logger.filters) == 1  # once, however often it is asked for
    missing = [ModuleNotFoundError(f"No module named '{name}'", name=name) for name in ("kernels", "torch._x")]
    for reason in (*missing, OSError("no network")):
        logger.warning(said, reason)
    logger.warning("another warning")
    assert [record.getMessage() for record in caplog.records] == [
        said % "No module named 'torch._x'", said % "no network", "another warning"]  # fmt: skip
