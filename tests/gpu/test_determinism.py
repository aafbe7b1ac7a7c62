"""Operators without a deterministic kernel on CUDA: those that we use, and why `cluster.deterministic` holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flowbp_ray.local import LocalLoop
from flowbp_ray.rewards import base
from flowbp_ray.utils.random import use_deterministic_kernels
from tests.backbones import tiny
from tests.conftest import Saved
from tests.gpu import standin, test_rewards
from tests.gpu.meters import Operators
from tests.gpu.runs import BALANCE, EMA, JITTER, METER, PENALTY, config_of

pytestmark = pytest.mark.gpu

# Of the documentation of torch.use_deterministic_algorithms (2.13): operators that raise on CUDA, or would, if torch's
# Python did not replace them.
NONDETERMINISTIC = (
    *(f"{kind}_backward" for kind in ("upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d")),
    *(f"{kind}_backward" for kind in ("upsample_trilinear3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")),
    *(f"{kind}_pad{n}d_backward" for kind in ("reflection", "replication") for n in (1, 2, 3)),
    *(f"{kind}_backward" for kind in ("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d")),
    *(f"{kind}_backward" for kind in ("avg_pool3d", "max_pool3d_with_indices", "fractional_max_pool2d")),
    *(f"{kind}_backward" for kind in ("grid_sampler_2d", "grid_sampler_3d", "_ctc_loss", "nll_loss2d")),
    *("max_unpool2d", "max_unpool3d", "put_", "histc", "bincount", "kthvalue", "median", "_embedding_bag"),
    *("_cdist_backward", "_pdist_backward", "cumsum", "scatter_reduce", "multilabel_margin_loss_backward"),
)

ALLOWED: dict[str, str] = {
    "cumsum": "of integers, which CUDA adds deterministically: positions of tokens",
    "replication_pad2d_backward": "jitter's shift: F.pad takes it apart where kernels must be deterministic",
}
"""What is met nevertheless, and why `cluster.deterministic` holds."""


@pytest.fixture
def deterministic() -> Iterator[None]:
    """`cluster.deterministic` changes its process."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


def unexplained(operators: Operators) -> dict[str, str]:
    return {name: place for name, place in operators.found.items() if name not in ALLOWED}


@pytest.mark.parametrize("family", [*tiny.NAMES, "shapes"])
def test_a_step_has_no_operator_that_is_unexplained(saved: Saved, tmp_path: Path, family: str) -> None:
    overrides = [*METER, *PENALTY, *EMA, *JITTER, *BALANCE]
    loop = LocalLoop(config_of(family, saved, tmp_path, "flowbp_bridge", *overrides))
    with Operators(NONDETERMINISTIC) as operators:
        loop.step(0)
    assert not unexplained(operators)


DIFFERENTIABLE = [n for n, case in test_rewards.CASES.items() if case.differentiable]
REFUSED = [n for n in DIFFERENTIABLE if not getattr(base.factory(test_rewards.CASES[n].kind), "deterministic", True)]
"""Those that a run with `cluster.deterministic` and `rewards.gpus` refuses (`preflight.check_deterministic`)."""


@pytest.mark.parametrize("name", [n for n in DIFFERENTIABLE if n not in REFUSED])
def test_a_reward_has_no_operator_that_is_unexplained(tmp_path: Path, name: str) -> None:
    case = test_rewards.CASES[name]
    options = case.options(tmp_path) | {"dtype": case.dtype}
    with Operators(NONDETERMINISTIC) as operators:
        test_rewards.scored(case, options, standin.KIND)
    assert not unexplained(operators)


def test_the_list_is_read_from_what_runs(tmp_path: Path) -> None:
    """A resize that is differentiated is met, and on the CPU it is not."""
    for device, met in ((standin.KIND, ["upsample_bilinear2d_backward"]), ("cpu", [])):
        x = torch.ones(1, 1, 4, 4, device=device, requires_grad=True)
        with Operators(NONDETERMINISTIC) as operators:
            torch.nn.functional.interpolate(x, (8, 8), mode="bilinear").sum().backward()
        assert list(operators.found) == met


def test_a_deterministic_run_is_the_other_one(saved: Saved, tmp_path: Path, deterministic: None) -> None:
    """Bit for bit, and new memory is not filled first."""
    plain = LocalLoop(config_of("shapes", saved, tmp_path / "plain", "flowbp_bridge"))
    plain.step(0)
    use_deterministic_kernels()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    strict = LocalLoop(config_of("shapes", saved, tmp_path / "strict", "flowbp_bridge"))
    strict.step(0)
    assert strict.learner.digest() == plain.learner.digest()
