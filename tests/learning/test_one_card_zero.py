"""DeepSpeed over a quantised and a shared base, in a process of its own, against the plain engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.local import LocalLoop
from flowbp_ray.utils.addresses import free_port
from flowbp_ray.weights.packing import merge_tensors
from tests.backbones import tiny
from tests.backbones.families import run_config


def config_of(folder: Path, dtype: str, *more: str) -> RunConfig:
    own = [f"backbone.dtype={dtype}", "backbone.quantization=nf4", "learners.lora={rank: 4, alpha: 8}", "steps=2"]
    return run_config("flux1", folder / "model", folder, "flowbp_bridge", *own, "drift.meter=true", *more)


def run(folder: Path, dtype: str, *more: str) -> None:
    """Train two steps, save and load; leave the published weights."""
    loop = LocalLoop(config_of(folder, dtype, *more))
    loop.step(0)
    loop.learner.save(str(folder / "saved"))
    loop.step(1)
    once = loop.learner.digest()
    loop.learner.load(str(folder / "saved"))
    report = loop.step(1)
    assert loop.learner.digest() == once
    assert max(report.drift) < (1e-6 if dtype == "float32" else 1e-2)
    torch.save(merge_tensors(list(loop.learner.publish())), folder / "weights.pt")


def main(folder: Path, zero: str, dtype: str) -> None:
    from flowbp_ray.learning.deepspeed import join_process_group

    torch.set_num_threads(1)
    deepspeed = ["learners.engine=deepspeed", f"learners.zero={zero}", "cluster.share_base=true"]
    join_process_group(0, config_of(folder, dtype, *deepspeed).learners, "127.0.0.1", free_port(""), 60.0)
    run(folder, dtype, *deepspeed)


@pytest.mark.deepspeed
@pytest.mark.parametrize(("zero", "dtype"), [("1", "float32"), ("2", "bfloat16")])
def test_zero_trains_the_adapters_of_the_plain_engine(tmp_path: Path, zero: str, dtype: str) -> None:
    """Up to the rounding of another order of sums; saved and restored bit for bit, without the base in the file."""
    tiny.save("flux1", tmp_path / "model")
    subprocess.run([sys.executable, "-m", "tests.learning.test_one_card_zero", str(tmp_path), zero, dtype], check=True)
    found = torch.load(tmp_path / "weights.pt")
    assert sum(f.stat().st_size for f in (tmp_path / "saved").rglob("*.pt")) < 50 * sum(
        t.nbytes for t in found.values()
    )
    run(tmp_path, dtype)
    want = torch.load(tmp_path / "weights.pt")
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=1e-2, atol=1e-3 if zero == "2" else 1e-4)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
