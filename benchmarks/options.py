"""The command line that the learner's benchmarks share, and what every result says about where it was measured."""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import shlex
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging

from benchmarks.models import Models, build
from benchmarks.problem import STEPS
from benchmarks.sizes import SIZES

WITH_K = ("flowbp_sparse", "flowbp_bridge")  # the methods whose number of active nodes is theirs to choose


@dataclass(frozen=True)
class Cell:
    """One row of a table."""

    method: str
    rows: int
    checkpointing: bool
    k: int

    def names(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "micro_batch": self.rows,
            "checkpointing": self.checkpointing,
            "k": self.k,
        }


def parser(about: str | None, k: Sequence[int], methods: Sequence[str]) -> argparse.ArgumentParser:
    """The options that say what is measured and where; `k` and `methods` are used where the command names none."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", choices=SIZES, default="sd3-14m", help="random weights of this size")
    made.add_argument("--device", default="cpu", help="cpu (one thread), cuda or cuda:N")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32, true sizes bfloat16")
    made.add_argument("--pixels", type=int, help="side of the image; default 128, 256 or (true sizes) 512")
    made.add_argument("--micro-batch", type=int, nargs="+", metavar="ROWS", help="default 1, sd3-14m 2")
    made.add_argument("--checkpointing", choices=("off", "on"), nargs="+", default=["off"])
    made.add_argument("-k", type=int, nargs="+", default=list(k), help="active nodes")
    made.add_argument("--method", choices=WITH_K, nargs="+", default=list(methods))
    return made


def models(options: argparse.Namespace) -> Models:
    """The models that the options ask for. Raises ValueError for what cannot be built here, saying what to write."""
    size, device = SIZES[options.model], _device(options.device)
    for name, values, most in (("--micro-batch", options.micro_batch or [1], None), ("-k", options.k, STEPS)):
        if min(values) < 1 or (most and max(values) > most):
            raise ValueError(f"{name} must be at least 1{f' and at most {most}' if most else ''}, got {values}")
    logging.set_verbosity_error()  # it warns of casting modules that these models do not have
    warnings.filterwarnings("ignore", "`gradient_checkpointing_", FutureWarning)  # the new name is not in 4.57
    torch.set_num_threads(1)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    dtype = getattr(torch, options.dtype or size.dtype)
    return build(size, device, dtype, options.pixels or size.pixels)


def _device(name: str) -> torch.device:
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ValueError(f"--device {name} is not measured; write --device cpu or --device cuda")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch reaches {torch.cuda.device_count()} CUDA devices; write --device cpu")
    return torch.device(name)


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Every combination that the options name, in their order."""
    rows = options.micro_batch or [SIZES[options.model].rows]
    for method, count, checkpointing, k in itertools.product(options.method, rows, options.checkpointing, options.k):
        yield Cell(method, count, checkpointing == "on", k)


def described(m: Models, options: argparse.Namespace, module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What a result begins with: the command, the model, the machine."""
    tokens = m.backbone.token_grid(m.pixels, m.pixels)
    rows = ", ".join(map(str, options.micro_batch or [m.size.rows]))
    on_gpu = m.device.type == "cuda"
    return {
        "command": shlex.join(["python", "-m", module, *arguments]),
        "model": f"{m.size.title}, {tokens[0] * tokens[1]} + {m.size.words} tokens, {rows} rows, "
        f"guidance {m.size.guidance:g}",
        "parameters": m.parameters,
        "pixels": m.pixels,
        "dtype": str(m.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(m.device) if on_gpu else f"{platform.machine()} CPU, one thread",
        "load": None if on_gpu else round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "random": "weights, states and embeddings",
    }
