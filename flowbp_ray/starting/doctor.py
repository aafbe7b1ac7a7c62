"""`flowbp-ray doctor`: what this machine has, and what would stop a run. It starts nothing and sends nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import psutil

from flowbp_ray.config import loading
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.preflight import check
from flowbp_ray.utils import accelerator
from flowbp_ray.utils.files import cache_folder
from flowbp_ray.utils.units import format_bytes

NEEDED = ("ray", "torch", "diffusers", "transformers", "peft", "deepspeed", "wandb", "safetensors")
EXTRAS = {
    "hps": ("open_clip_torch", "the reward hpsv2"),
    "quant": ("bitsandbytes", "quantised bases and moments in 8 bits"),
    "ocr": ("rapidocr", "the reward for text in pictures"),
    "serve": ("uvicorn", "flowbp-ray serve-reward"),
    "tensorboard": ("tensorboard", "tracking.tensorboard"),
    "mlflow": ("mlflow", "tracking.mlflow"),
    "judge": ("vllm", "judges; usually in an environment of its own"),
}
SECRETS = ("WANDB_API_KEY", "HF_TOKEN")
FREE = 5 * 2**30  # bytes; a checkpoint of the smallest of the published models takes more
SHARED = 2**30  # bytes of /dev/shm; below it Ray puts its objects on the disk
FILES = 4096  # open files; Ray holds some for each process
PATIENCE = 3.0  # seconds for a cluster to accept a connection


@dataclass(frozen=True)
class Line:
    """One finding. kind: "stop" ends every run, "warn" some; advice: what to do about it."""

    kind: Literal["ok", "warn", "stop"]
    name: str
    value: str
    advice: str = ""


def examine(config: str | None, overrides: Sequence[str], output: Path = Path("runs")) -> Iterator[Line]:
    """Look at everything, cheap things first.

    config: also check what it names, as `train` does before it starts. output: the folder of runs, without a config.
    """
    loaded, refused = _load(config, overrides)
    yield Line("ok", "Python", f"{platform.python_version()}, {platform.platform(terse=True)}")
    yield from _packages()
    yield from _devices()
    yield from _host()
    yield from _disks(output if loaded is None else Path(loaded.output), loaded)
    yield from _ray(loaded)
    for name in SECRETS:
        yield Line("ok", name, "set" if os.environ.get(name) else "not set")
    if config is not None:
        yield _configuration(config, loaded, refused)


def _load(config: str | None, overrides: Sequence[str]) -> tuple[RunConfig | None, str]:
    """The configuration, if one is asked for; or why it cannot be read."""
    try:
        return (None if config is None else loading.load(config, overrides)), ""
    except (ValueError, OSError) as error:
        return None, str(error)


def _packages() -> Iterator[Line]:
    for name in NEEDED:
        version = _version(name)
        if version is None:
            yield Line("stop", name, "not installed", "pip install -e . in the project's folder")
        else:
            yield Line("ok", name, version)
    for extra, (package, use) in EXTRAS.items():
        version = _version(package)
        yield Line("ok", f"extra {extra}", f"{package} {version}" if version else f"not installed: {use}")


def _version(name: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def _devices() -> Iterator[Line]:
    import torch

    for index, (model, nbytes) in enumerate(found := accelerator.devices()):
        yield Line("ok", f"GPU {index}", f"{model}, {format_bytes(nbytes)}")
    if found:
        return
    if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists():
        yield Line(
            "warn", "GPU", f"there is one, but torch {torch.__version__} sees none", "docs/gpus.md says which torch"
        )
    else:
        yield Line("ok", "GPU", "none: the embedded model (make demo) and tests run on CPUs")


def _host() -> Iterator[Line]:
    memory = psutil.virtual_memory()
    low = memory.available < 4 * 2**30
    value = f"{format_bytes(memory.available)} of {format_bytes(memory.total)} free, {psutil.cpu_count()} cores"
    yield Line("warn" if low else "ok", "memory", value, "make demo takes about 6 GB" if low else "")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= soft < FILES
    most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    yield Line("warn" if few else "ok", "open files", str(soft), f"ulimit -n {most}" if few else "")


def _disks(output: Path, config: RunConfig | None) -> Iterator[Line]:
    folders = {"output": output, "temporary": Path("/tmp")}
    try:
        if cache := cache_folder("auto" if config is None else config.encoder.cache):
            folders["embedding cache"] = cache
    except ValueError as error:
        yield Line("stop", "embedding cache", "cannot be used", str(error))
    for name, folder in folders.items():
        there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        free, few = shutil.disk_usage(there).free, shutil.disk_usage(there).free < FREE
        advice = f"less than {format_bytes(FREE)}: checkpoints may not fit" if few else ""
        yield Line("warn" if few else "ok", name, f"{folder}: {format_bytes(free)} free", advice)
        if name == "output" and not os.access(there, os.W_OK):
            yield Line("stop", name, f"{there} cannot be written to", "write output=/another/folder")
    with suppress(OSError):
        shared = shutil.disk_usage("/dev/shm").free
        few = shared < SHARED
        advice = "a container needs --shm-size; Ray's objects go to the disk otherwise" if few else ""
        yield Line("warn" if few else "ok", "/dev/shm", f"{format_bytes(shared)} free", advice)


def _ray(config: RunConfig | None) -> Iterator[Line]:
    """Whether the cluster that a run would join takes connections: RAY_ADDRESS goes before cluster.address."""
    given = os.environ.get("RAY_ADDRESS", "")
    key, other = ("RAY_ADDRESS", "unset RAY_ADDRESS") if given else ("cluster.address", "write cluster.address=local")
    address = given or ("local" if config is None else config.cluster.address)
    if address == "local":
        why = f"{key} is local" if given else "RAY_ADDRESS is not set"
        yield Line("ok", "Ray cluster", f"{why}: each run starts a private Ray")
        return
    if address == "auto":
        yield Line("ok", "Ray cluster", f"{key}=auto: the one that runs on this machine; `ray status` shows it")
        return
    if "://" in address:
        yield Line("stop", "Ray cluster", f"{key}={address} is no address to join", f"write host:6379, or {other}")
        return
    try:
        parts = urlsplit(f"//{address}")
        with socket.create_connection((parts.hostname or address, parts.port or 6379), PATIENCE):
            yield Line("ok", "Ray cluster", f"{address} accepts connections")
    except (OSError, ValueError) as error:
        yield Line("stop", "Ray cluster", f"{key}={address}: {error}", f"start it, or {other}")


def _configuration(config: str, loaded: RunConfig | None, refused: str) -> Line:
    """The first thing that `train` would refuse. refused: why the configuration could not be read."""
    if loaded is None:
        return Line("stop", config, "train would refuse it", refused)
    try:
        checked = check(loaded)
    except (ValueError, OSError) as error:
        return Line("stop", config, "train would refuse it", str(error))
    return Line("ok", config, f"training {checked.trains}; {len(checked.training)} prompts")
