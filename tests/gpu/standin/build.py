"""Builds the stand-in's extension once and keeps it: about a minute of one core, then nothing.

It lies in `standin-<hash of what goes in>` below flowbp_ray in $XDG_CACHE_HOME or ~/.cache, or below the
$FLOWBP_RAY_CACHE that the tests were started with. Processes that want it at the same time wait for the first.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import torch

NAME = "flowbp_ray_standin"
HERE = Path(__file__).parent
SOURCES = (HERE / "device.cpp", HERE / "kernels.cpp")
FLAGS = ("-O1", "-std=c++20")
PLACE = "FLOWBP_RAY_STANDIN"
"""The environment variable that tells a worker process where it was built."""
_own = os.environ.get(PLACE) or os.environ.get("FLOWBP_RAY_CACHE")  # at import: later the tests have one of their own
CACHE = Path(_own) if _own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowbp_ray"


def missing() -> str | None:
    """Why it cannot be built here, as one line; None if it can, or is there already."""
    if (folder() / f"{NAME}.so").exists():
        return None
    if shutil.which(compiler := os.environ.get("CXX", "c++")) is None:
        return f"the stand-in for a GPU is built with a C++ compiler, and there is no {compiler}; install g++"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "the stand-in for a GPU is built with Python's headers, and there are none; install python3-dev"
    from torch.utils.cpp_extension import is_ninja_available

    return None if is_ninja_available() else "the stand-in for a GPU is built with ninja; pip install ninja"


def folder() -> Path:
    """Where the extension lies, by what goes into it."""
    parts = [torch.__version__, sys.version, *FLAGS, *(path.read_text() for path in (*SOURCES, HERE / "device.h"))]
    return CACHE / f"standin-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"


def load() -> ModuleType:
    """The extension, built where it is not there yet."""
    place = folder()
    made = place / f"{NAME}.so"
    if not made.exists():
        place.mkdir(parents=True, exist_ok=True)
        with open(place / "building", "w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)  # ends with the process that holds it
            if not made.exists():
                _build(place, made)
    spec = importlib.util.spec_from_file_location(NAME, made)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(place: Path, made: Path) -> None:
    from torch.utils import cpp_extension

    work = place / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    os.environ.setdefault("MAX_JOBS", "2")
    path = os.environ["PATH"]
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])  # where pip puts ninja
    try:
        cpp_extension.load(NAME, [str(p) for p in SOURCES], build_directory=str(work), extra_cflags=list(FLAGS))
    finally:
        os.environ["PATH"] = path
    (work / made.name).rename(made)
    shutil.rmtree(work)
