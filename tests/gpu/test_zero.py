"""DeepSpeed's engine on the stand-in, one rank and two, each in a process of its own: a step is the CPU's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowbp_ray.utils.addresses import free_port
from flowbp_ray.utils.checksums import combine
from flowbp_ray.utils.digest import digest
from flowbp_ray.weights.fingerprint import fingerprint
from tests.backbones import tiny
from tests.gpu import standin, zero
from tests.gpu.runs import METER, PENALTY, on_cpu, plain_attention, relative
from tests.gpu.standin import build
from tests.paths import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.deepspeed, pytest.mark.timeout(900)]

ENGINE = {"zero0": 3, "zero1": 5, "zero2": 5}
"""Waits of a step that the engine makes: the gradient's norm, three times and once up; in bf16 whether it overflows."""
PER_TENSOR = {"zero1-offload-bf16": 2}
"""DeepSpeed's offload reads of each tensor's gradient whether it is finite, and its norm. ZeRO-3 synchronises for each
parameter that it gathers, so its waits are not counted here."""


def start(folder: Path, where: str, ranks: int) -> list[subprocess.Popen[str]]:
    port = free_port("")
    command = [sys.executable, "-m", "tests.gpu.zero", str(folder), where]
    environment = os.environ | {build.PLACE: str(build.CACHE)}
    return [
        subprocess.Popen([*command, *map(str, (rank, ranks, port))], cwd=ROOT, env=environment)
        for rank in range(ranks)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen[str]]) -> None:
    try:
        assert [process.wait(timeout=600) for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            process.kill()


def left(folder: Path, where: str, ranks: int, name: str) -> list[zero.Left]:
    """What each rank left of a case."""
    files = [folder / f"{where}_{ranks}" / f"{name}_{rank}.pt" for rank in range(ranks)]
    return [torch.load(file, weights_only=False) for file in files]


def plain(folder: Path, name: str, ranks: int) -> zero.Left:
    """What the engine `torch` leaves of the same step, one rank on the CPU."""
    output = folder / f"plain_{name}"
    with plain_attention():
        return zero.steps(on_cpu(zero.config(folder, output, name, ranks, plain=True)), output)


def check(name: str, there: list[zero.Left], here: zero.Left) -> None:
    """The step of the ranks `there` is the one `here`; what they publish arrives, and what they save comes back."""
    exact = "bf16" not in name
    for rank in there:
        assert relative(rank.change, here.change) <= (1e-3 if exact else 0.2), name
        assert rank.grad_norm == pytest.approx(here.grad_norm, rel=1e-5 if exact else 3e-2), name
        assert rank.devices == {standin.KIND}, name
        assert rank.digests[0] == rank.digests[1] == there[0].digests[0], name
    for ema in there[0].published:
        published = {key: tensor for rank in there for key, tensor in rank.published[ema].items()}
        assert fingerprint(published) == combine([rank.checksums[ema] for rank in there]), name
        assert ema or digest(published) == there[0].arrived, name


def check_waits(name: str, rank: zero.Left, overrides: list[str]) -> None:
    """Few, whatever the number of forwards: what the engine does, the finite velocities, and each meter."""
    if name.startswith("zero3"):
        return
    around = 1 + (METER[0] in overrides) + (PENALTY[0] in overrides)
    assert rank.waits <= around + ENGINE[name[:5]] + PER_TENSOR.get(name, 0) * (rank.trained + 1), rank.places


def test_one_rank(tmp_path: Path) -> None:
    """Of the CPU's DeepSpeed, each case, and of the plain engine; and faults on purpose, which the CPU lets pass."""
    tiny.save(zero.FAMILY, tmp_path / zero.FAMILY)
    finish([*start(tmp_path, "gpu", 1), *start(tmp_path, "cpu", 1)])
    for name, (_, overrides) in zero.CASES[1].items():
        there, [here] = left(tmp_path, "gpu", 1, name), left(tmp_path, "cpu", 1, name)
        check(name, there, here)
        check_waits(name, there[0], overrides)
    for name in ("zero1", "zero2-bf16"):
        check(name, left(tmp_path, "gpu", 1, name), plain(tmp_path, name, 1))
    noticed, passed = (torch.load(tmp_path / f"{where}_1" / "faults.pt") for where in ("gpu", "cpu"))
    assert "same device" in noticed["the average stays on the host"]
    assert "device type cpu" in noticed["masters are gathered on the host"]
    assert set(passed.values()) == {""}


def test_two_ranks(tmp_path: Path) -> None:
    """A device each, half of the batch each: the step is that of the plain engine on one rank."""
    tiny.save(zero.FAMILY, tmp_path / zero.FAMILY)
    finish(start(tmp_path, "gpu", 2))
    for name, (_, overrides) in zero.CASES[2].items():
        there = left(tmp_path, "gpu", 2, name)
        check(name, there, plain(tmp_path, name, 2))
        for rank in there:
            check_waits(name, rank, overrides)
