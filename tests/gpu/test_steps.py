"""A whole step of every family on the stand-in: nothing is on the wrong device, and the numbers are the CPU's.

`CASES` covers, rather than multiplies: each family with both dtypes, with all weights and adapters, with every meter;
each method on some family, and all of them on the embedded model. A new case is a line.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowbp_ray.local import LocalLoop
from flowbp_ray.messages import Version
from flowbp_ray.utils.checksums import combine
from tests.conftest import Saved
from tests.gpu import standin
from tests.gpu.runs import (
    ATTACHED,
    BALANCE,
    BF16,
    DRIFT_MAX,
    EMA,
    FUSED,
    INT8,
    JITTER,
    LORA,
    METER,
    METHODS,
    MOMENTS,
    NF4,
    PENALTY,
    SHARED,
    config_of,
    on_cpu,
    one_step,
    plain_attention,
    relative,
)

pytestmark = pytest.mark.gpu

CASES: list[tuple[str, str, list[str]]] = [
    ("sd35", "flowbp_bridge", [*METER, *PENALTY, *EMA]),
    ("sd35", "flowbp_sparse", [*BF16, *LORA, *PENALTY, *DRIFT_MAX]),
    ("sd35", "draft_lv", [*METER, *PENALTY, *FUSED]),
    ("sd35", "flowbp_lagrange", [*BF16, *BALANCE, *JITTER]),
    ("sd35", "refl", [*ATTACHED, *FUSED]),
    ("flux1", "flowbp_bridge", [*BF16, *METER, *PENALTY, *EMA]),
    ("flux1", "drtune", [*LORA, *DRIFT_MAX]),
    ("flux1", "leapalign", [*METER, *BALANCE]),
    ("flux2", "flowbp_lagrange", [*METER, *PENALTY]),
    ("flux2", "flowbp_bridge", [*BF16, *LORA, *PENALTY, *DRIFT_MAX, *BALANCE, *JITTER]),
    ("flux2", "refl", [*BF16, *EMA]),
    ("qwen_image", "flowbp_bridge", [*METER, *PENALTY, *EMA]),
    ("qwen_image", "flowbp_sparse", [*BF16, *LORA, *PENALTY, *DRIFT_MAX]),
    ("qwen_image", "draft_lv", [*BF16, *METER, *ATTACHED]),
    ("sd35", "flowbp_sparse", [*NF4, *METER, *PENALTY]),
    ("flux1", "flowbp_bridge", [*BF16, *INT8, *DRIFT_MAX, *MOMENTS, *SHARED]),
    ("flux2", "leapalign", [*BF16, *NF4, *PENALTY, *SHARED]),
    ("qwen_image", "draft_lv", [*INT8, *METER, *ATTACHED]),
    *(("shapes", method, METER) for method in METHODS),
]


def name_of(case: tuple[str, str, list[str]]) -> str:
    family, method, overrides = case
    return "-".join([family, method, *(o.split("=")[0].rpartition(".")[2] for o in overrides)])


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_step_on_the_gpu_is_the_cpu_s(saved: Saved, tmp_path: Path, case: tuple[str, str, list[str]]) -> None:
    family, method, overrides = case
    config = config_of(family, saved, tmp_path / "gpu", method, *overrides)
    loop = LocalLoop(config)
    for module in (loop.sampler.transformer, loop.learner.engine.module):
        tensors = [*module.named_parameters(), *module.named_buffers()]
        assert not [name for name, tensor in tensors if tensor.device.type != standin.KIND]
    there = one_step(loop)
    with plain_attention():
        here = one_step(LocalLoop(on_cpu(config)))
    exact = config.backbone.torch_dtype == torch.float32
    near = 1e-5 if exact else 3e-2  # seven of the steps between bf16 numbers
    for mine, theirs in zip([*there.targets, *there.cotangents], [*here.targets, *here.cotangents], strict=True):
        assert relative(mine, theirs) <= near
    assert there.scores == pytest.approx(here.scores, rel=near, abs=near)
    assert there.report.grad_norm == pytest.approx(here.report.grad_norm, rel=near)
    assert relative(there.change, here.change) <= (1e-3 if exact else 0.2)  # Adam's first step is nearly a sign
    assert not there.report.faults and there.report.grad_norm > 0
    for mine, theirs in (
        (there.report.drift, here.report.drift),
        (there.report.base_distance, here.report.base_distance),
    ):
        assert mine == pytest.approx(theirs, rel=near, abs=1e-4 if exact else 0.1)


PUBLISHED = [
    ("sd35", BF16), ("flux1", [*BF16, *LORA]), ("flux1", NF4), ("sd35", [*BF16, *INT8]), ("shapes", EMA)
]  # fmt: skip


@pytest.mark.parametrize("family, more", PUBLISHED)
def test_published_weights_arrive(saved: Saved, tmp_path: Path, family: str, more: list[str]) -> None:
    """Bit for bit, by three ways of looking: the sampler's digest, its fingerprint, and the learner's masters."""
    loop = LocalLoop(config_of(family, saved, tmp_path, "flowbp_bridge", *more))
    loop.step(0)
    loop.sampler.ensure_version(Version(0, 99), lambda: list(loop.learner.publish()))
    assert loop.sampler.digest() == loop.learner.digest()
    assert loop.sampler.fingerprint == combine([loop.learner.checksums()])
    parameters = loop.sampler.transformer.parameters()
    assert {p.device.type for p in parameters} == {standin.KIND}


def test_the_step_s_memory_is_given_back(saved: Saved, tmp_path: Path) -> None:
    """After a step the devices hold what they held after the step before: no graph and no state is kept."""
    loop = LocalLoop(config_of("sd35", saved, tmp_path, "flowbp_bridge", *METER, *PENALTY))
    held = []
    for step in range(3):
        loop.step(step)
        held.append(standin.memory()["live"])
    assert held[1] == held[2]
    standin.reset_peak()
    loop.step(3)
    assert standin.memory()["peak"] > held[2]
