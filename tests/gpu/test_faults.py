"""Faults put in on purpose, of the kinds that a CPU does not notice: the stand-in does, each of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowbp_ray.backbones import Backbone, guidance
from flowbp_ray.backbones.quantised import QuantisedLinear
from flowbp_ray.learning import learner
from flowbp_ray.local import LocalLoop
from flowbp_ray.messages import Packed
from flowbp_ray.rewards import scorer
from flowbp_ray.rollout import execute, sampler
from flowbp_ray.utils import random
from tests.conftest import Saved
from tests.gpu.runs import INT8, METER, NF4, PENALTY, config_of, on_cpu

pytestmark = pytest.mark.gpu


def stays(_: Any, tensor: Tensor) -> Tensor:
    return tensor


def bare(tensor: Tensor) -> Packed:
    return Packed(tensor.detach().contiguous().numpy(), "float32")


def host_noise(self: sampler.Sampler, item: Any) -> Tensor:
    return sampler.noise_of(item, self.latent_shape).to(self.config.torch_dtype)


def seeded(item: Any, velocity: Any, sigmas: Tensor, noise: Tensor, *rest: Any) -> Any:
    return execute.run_item(item, velocity, sigmas, noise.normal_(generator=torch.Generator()), *rest)


def on_the_host(device: str) -> Callable[..., Any]:
    return lambda name, _, /, **options: scorer.base.build(name, device, **options)


def host_decoder(self: Any, device: str, *how: Any) -> Any:
    return load_decoder(self, "cpu", *how)


load_decoder = Backbone.load_decoder

FAULTS: dict[str, tuple[Any, str, Any]] = {
    "the embeddings stay on the host": (guidance, "_moved", lambda tensor, device: tensor),
    "the noise stays on the host": (sampler.Sampler, "_noise", host_noise),
    "a host's generator draws on the GPU": (sampler, "run_item", seeded),
    "the learner's states stay on the host": (learner.Learner, "_there", stays),
    "a reward is built on the host": (scorer, "build", on_the_host("cpu")),
    "a cotangent is sent as it is": (scorer, "pack", bare),
    "the decoder stays on the host": (Backbone, "load_decoder", host_decoder),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_is_noticed(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """A step raises on the stand-in; on the CPU the same fault passes."""
    owner, name, fault = FAULTS[what]
    config = config_of("sd35", saved, tmp_path, "flowbp_bridge", *METER, *PENALTY)
    assert hasattr(owner, name)
    monkeypatch.setattr(owner, name, fault)
    with pytest.raises((RuntimeError, TypeError), match=r"same device|on cpu or on|weight type|numpy|generator"):
        LocalLoop(config).step(0)
    assert LocalLoop(on_cpu(config)).step(0).grad_norm > 0


@pytest.mark.parametrize("kind", [INT8, NF4], ids=["int8", "nf4"])
@pytest.mark.parametrize("part", ["codes", "scales"])
def test_a_quantised_weight_on_the_host_is_noticed(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: list[str], part: str
) -> None:
    """As it would be if its codes, or its scales, were no buffers: what moves a module would leave them."""
    config = config_of("sd35", saved, tmp_path, "flowbp_bridge", *kind)
    register = QuantisedLinear.register_buffer

    def left(self: Any, name: str, tensor: Tensor, persistent: bool) -> None:
        if name == part:
            setattr(self, name, tensor.cpu())
        else:
            register(self, name, tensor, persistent)

    monkeypatch.setattr(QuantisedLinear, "register_buffer", left)
    with pytest.raises(RuntimeError, match="same device"):
        LocalLoop(config).step(0)
    assert LocalLoop(on_cpu(config)).step(0).grad_norm > 0


def test_without_a_fault_nothing_is_noticed(saved: Saved, tmp_path: Path) -> None:
    assert LocalLoop(config_of("sd35", saved, tmp_path, "flowbp_bridge", *METER, *PENALTY)).step(0).grad_norm > 0
    assert random.normal((2,), 0, "noise", 0, [0]).device.type == "cpu"
