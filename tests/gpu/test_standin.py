"""The stand-in refuses what CUDA refuses, counts what a host would wait for, and meters what is allocated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowbp_ray.utils import accelerator
from tests.gpu import standin
from tests.gpu.meters import Waits
from tests.gpu.runs import relative

pytestmark = pytest.mark.gpu


def device(index: int = 0) -> str:
    return f"{standin.KIND}:{index}"


def here(*shape: int) -> Tensor:
    return torch.ones(*shape, device=device())


REFUSED: dict[str, Callable[[], object]] = {
    "a sum": lambda: here(3) + torch.ones(3),
    "a product": lambda: here(3, 3) @ torch.ones(3, 3),
    "in place": lambda: here(3).add_(torch.ones(3)),
    "cat": lambda: torch.cat([here(1, 3), torch.ones(1, 3)]),
    "stack with a number": lambda: torch.stack([here(1)[0], torch.tensor(1.0)]),
    "where": lambda: torch.where(torch.ones(3, dtype=torch.bool), here(3), here(3)),
    "convolution": lambda: torch.conv2d(here(1, 1, 4, 4), torch.ones(1, 1, 2, 2)),
    "layer norm": lambda: torch.layer_norm(here(2, 3), [3], torch.ones(3)),
    "embedding": lambda: torch.embedding(here(4, 2), torch.tensor([0])),
    "index of the GPU": lambda: torch.ones(4)[torch.zeros(1, dtype=torch.int64, device=device())],
    "values of the host": lambda: here(3).index_put_((torch.tensor([0, 1]),), torch.ones(2)),
    "two devices": lambda: here(3) + torch.ones(3, device=device(1)),
    "a host's generator": lambda: here(3).normal_(generator=torch.Generator()),
    "a host's generator, made there": lambda: torch.randn(3, device=device(), generator=torch.Generator()),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cuda_refuses(what: str) -> None:
    with pytest.raises(RuntimeError, match=r"same device|on cpu or on|generator"):
        REFUSED[what]()


def test_numpy_is_refused() -> None:
    with pytest.raises(TypeError, match="numpy"):
        here(3).numpy()


def test_what_cuda_takes() -> None:
    """A number of the host beside a tensor, and a host's index: as on CUDA."""
    assert (here(3) + torch.tensor(2.0)).tolist() == [3.0] * 3
    assert here(4)[torch.tensor([0, 1])].shape == (2,)
    assert here(3).to(device(1)).device == torch.device(device(1))


WAITING: dict[str, tuple[str, Callable[[], object]]] = {
    "a value": ("value", lambda: here(1).item()),
    "whether": ("value", lambda: bool(here(1).sum() > 0)),
    "a list": ("download", lambda: here(3).tolist()),
    "an upload": ("upload", lambda: torch.ones(3).to(device())),
    "a tensor from numbers": ("upload", lambda: torch.tensor([1, 2], device=device())),
    "a download that may not block, into pageable memory": (
        "download",
        lambda: torch.empty(3).copy_(here(3), non_blocking=True),
    ),
    "a mask as index": ("index by mask", lambda: here(3)[here(3) > 0]),
    "a list as index": ("upload of an index", lambda: here(3)[torch.tensor([0])]),
    "nonzero": ("nonzero", lambda: here(3).nonzero()),
}


@pytest.mark.parametrize("what", WAITING)
def test_what_a_host_waits_for(what: str) -> None:
    kind, work = WAITING[what]
    with Waits() as waits:
        work()
    assert waits.kinds[kind] == 1, waits


def test_what_it_does_not_wait_for() -> None:
    there, pinned = here(3), torch.empty(3).pin_memory()
    assert pinned.is_pinned()
    with Waits() as waits:
        sent = torch.arange(3).to(device(), non_blocking=True)
        pinned.copy_(there * 2 + sent, non_blocking=True)
        torch.arange(3, device=device())
        there[sent]
    assert not waits.total, waits
    assert pinned.tolist() == [2.0, 3.0, 4.0]


def test_memory_is_metered_per_device() -> None:
    before, other = standin.memory()["live"], standin.memory(1)["live"]
    standin.reset_peak()
    kept = here(1000)
    assert standin.memory()["live"] == before + 4000
    del kept
    assert standin.memory() == {"live": before, "peak": before + 4000}
    assert standin.memory(1)["live"] == other


def test_gradients_are_the_cpu_s() -> None:
    """Of a convolution, norms and a loss, which torch would take apart for a device that it does not know."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.SiLU(), torch.nn.Flatten(2), torch.nn.LayerNorm(36)
    )
    x = torch.randn(2, 3, 8, 8)

    def gradients(where: str) -> list[Tensor]:
        net.to(where)
        given = x.detach().to(where).requires_grad_()
        net(given).sin().square().mean().backward()
        found = [given.grad, *(p.grad for p in net.parameters())]
        net.zero_grad()
        return [g.cpu() for g in found if g is not None]

    here, there = gradients("cpu"), gradients(device())
    assert len(here) == 7 and all(relative(a, b) <= 1e-5 for a, b in zip(there, here, strict=True))


@pytest.mark.parametrize(
    "assigned, visible, chosen",
    [(["1"], None, 1), (["0"], None, 0), (["5"], "4,5", 1), (["5"], "5", 0), (["5", "4"], "4,5", 0), ([], None, 0)],
)
def test_a_process_computes_on_the_gpu_that_ray_gave_it(assigned: list[str], visible: str | None, chosen: int) -> None:
    """With RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1 it sees all of them, and "cuda" alone would be number 0."""
    accelerator.choose(assigned, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert accelerator.current() == chosen
    assert torch.ones(1, device=standin.KIND).device.index == chosen


def test_a_gpu_that_is_not_seen_is_one_line() -> None:
    with pytest.raises(ValueError, match="Ray assigned GPU 7, but this process sees 4, 5"):
        accelerator.choose(["7"], {"CUDA_VISIBLE_DEVICES": "4,5"})
