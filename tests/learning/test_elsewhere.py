"""A state is the same on another number of ranks, at another ZeRO stage, and on another engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowbp_ray.learning.engine import TorchEngine
from flowbp_ray.utils.addresses import free_port
from tests.learning.elsewhere import CASES, config, name_of, network, stepped
from tests.learning.merging import merged, updates


def launch(folder: Path, ranks: int) -> None:
    """Run all ranks of `tests.learning.elsewhere` to their ends."""
    command = [sys.executable, "-m", "tests.learning.elsewhere", str(folder)]
    port = str(free_port(""))
    started = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), port],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(ranks)
    ]
    said = [process.communicate()[1] for process in started]
    assert all(process.returncode == 0 for process in started), said[0][-3000:]


def whole(tensors: dict[str, Tensor], kind: str) -> Tensor:
    return torch.cat([tensors[key] for key in sorted(tensors) if key.startswith(f"{kind}/")])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain torch after two steps, `float32` and `bfloat16`; and after three, `…-on`. DeepSpeed reads the former."""
    made = tmp_path_factory.mktemp("states")
    for name in ("float32", "bfloat16"):
        engine = TorchEngine(network(getattr(torch, name)), config(engine="torch"))
        for seed in (1, 2):
            stepped(engine, seed)
        engine.save(made / name)
        stepped(engine, 5)
        engine.save(made / f"{name}-on")
    launch(made, 2)
    launch(made, 1)
    return made


@pytest.mark.deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_what_another_engine_wrote_is_read_with_the_same_bits(folder: Path, case: tuple[int, bool, str]) -> None:
    """Masters, moments, average and counter; torch to one and two ranks, two ranks to one at another stage."""
    start, name = merged(folder / case[2]), name_of(case)
    assert {key.split("/")[0] for key in start} == {"master", "exp_avg", "exp_avg_sq", "average"}
    assert updates(folder / case[2]) == {2}
    for ranks in (1, 2):
        read = folder / f"{ranks}-{name}-read"
        assert len(list((read / "engine").iterdir())) == 2 * ranks
        found = merged(read)
        assert found.keys() == start.keys() and all(torch.equal(found[key], start[key]) for key in start)
        assert updates(read) == {2}
    two, back = merged(folder / f"2-{name}-on"), merged(folder / f"{name}-back")
    assert two.keys() == back.keys() and all(torch.equal(two[key], back[key]) for key in two)
    assert updates(folder / f"{name}-back") == {3}


@pytest.mark.deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_next_step_is_that_of_plain_torch(folder: Path, case: tuple[int, bool, str]) -> None:
    """Within 1e-6 in fp32. In bf16, where two ranks round two gradients, within a hundredth of what the step moved."""
    start, want = merged(folder / case[2]), merged(folder / f"{case[2]}-on")
    for ranks in (1, 2):
        found = merged(folder / f"{ranks}-{name_of(case)}-on")
        for kind in ("master", "average"):
            got, true = whole(found, kind), whole(want, kind)
            moved = float((whole(start, kind) - true).norm())
            assert moved > 1e-3 * float(true.norm())
            bound = 1e-6 * float(true.norm()) if case[2] == "float32" else 1e-2 * moved
            assert float((got - true).norm()) <= bound


@pytest.mark.deepspeed
@pytest.mark.slow
def test_plain_torch_goes_on_from_two_ranks(folder: Path, tmp_path: Path) -> None:
    """The module holds the masters, cast; and another state of the engine is overwritten in full."""
    for case in CASES:
        saved = folder / f"2-{name_of(case)}-on"
        engine = TorchEngine(network(getattr(torch, case[2])), config(engine="torch"))
        stepped(engine, 9)
        engine.load(saved)
        engine.save(tmp_path / name_of(case))
        want, found = merged(saved), merged(tmp_path / name_of(case))
        assert want.keys() == found.keys() and all(torch.equal(want[key], found[key]) for key in want)
        for name, p in engine.module.named_parameters():
            if p.requires_grad:
                assert torch.equal(p.detach().view(-1), want[f"master/{name}"].float().to(p.dtype))
