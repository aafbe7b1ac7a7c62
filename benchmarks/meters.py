"""What a piece of work costs: bytes saved for backward, bytes allocated, seconds; and whether it fits at all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flowbp_ray.utils.memory_meter import LiveBytes

T = TypeVar("T")


class SavedBytes:
    """Bytes that live graphs hold for backward, and their peak (saved-tensor hooks; each storage counts once).

    What a checkpointed block recomputes during the backward is not seen.
    """

    def __init__(self) -> None:
        self.live = self.peak = 0
        self.holders: dict[int, int] = {}

    def measure(self, work: Callable[[], object]) -> int:
        """The peak while `work` runs, parameters that graphs hold included."""
        meter = self

        class Box:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor, self.key = tensor, tensor.untyped_storage().data_ptr()
                if meter.holders.setdefault(self.key, 0) == 0:
                    meter.live += tensor.untyped_storage().nbytes()
                meter.holders[self.key] += 1
                meter.peak = max(meter.peak, meter.live)

            def __del__(self) -> None:
                meter.holders[self.key] -= 1
                if meter.holders[self.key] == 0:
                    meter.live -= self.tensor.untyped_storage().nbytes()

        with torch.autograd.graph.saved_tensors_hooks(Box, lambda box: box.tensor):
            work()
        return self.peak


def peak_bytes(work: Callable[[], object], device: torch.device, modules: Iterable[nn.Module]) -> int:
    """The most bytes allocated while `work` runs, the modules' parameters and gradients included.

    On CUDA everything that this process holds on the device counts; elsewhere `modules` and what `work` makes.
    """
    tidy(device)
    if device.type != "cuda":
        tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        return LiveBytes([*tensors, *(t.grad for t in tensors if t.grad is not None)]).measure(work)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time on the device between CUDA events, or CPU time of this process, all threads."""
    if device.type != "cuda":
        started = time.process_time()
        work()
        return time.process_time() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000.0


def attempt(work: Callable[[], T], device: torch.device) -> T | None:
    """What `work` returns, or None where memory does not suffice for it; any other error is raised."""
    try:
        return work()
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator raises a plain one
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
    tidy(device)  # after the except clause, whose traceback holds the graph
    return None


def tidy(device: torch.device) -> None:
    """Free what nobody refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """The parameters' gradients, moved to host memory and dropped here: two sets need not fit on a device."""
    found = {name: p.grad.cpu() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


def compare(module: nn.Module, reference: dict[str, Tensor]) -> dict[str, float]:
    """The module's gradients against `reference`, one parameter at a time in fp64, then dropped.

    Returns {"relative_l2": |g − r| / |r|, "cosine": g·r / (|g| |r|)}.
    """
    found = {name: p for name, p in module.named_parameters() if p.grad is not None}
    assert found.keys() == reference.keys(), "gradients of different parameters"
    difference = dot = g2 = r2 = 0.0
    for name, p in found.items():
        assert p.grad is not None
        g, r = p.grad.double(), reference[name].to(p.device).double()
        difference += float((g - r).square().sum())
        dot, g2, r2 = dot + float((g * r).sum()), g2 + float(g.square().sum()), r2 + float(r.square().sum())
        p.grad = None
    return {"relative_l2": (difference / r2) ** 0.5, "cosine": dot / (g2 * r2) ** 0.5}


def paired(a: Callable[[], float], b: Callable[[], float], pairs: int) -> dict[str, Any]:
    """Medians of `pairs` pairs of measurements; `ratio` is a / b. Run both once before: the first does not count."""
    measured = []
    for turn in range(pairs):
        order = (a, b) if turn % 2 == 0 else (b, a)
        values = {f: f() for f in order}
        measured.append((values[a], values[b]))
    ratios = sorted(x / y for x, y in measured)
    return {
        "pairs": pairs,
        "a_s": round(statistics.median(x for x, _ in measured), 4),
        "b_s": round(statistics.median(y for _, y in measured), 4),
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(r, 3) for r in ratios],
    }


def alone(measure: Callable[[], float] | None, repeats: int) -> float | None:
    """The median of one side where the other does not fit; None for the one that does not."""
    return None if measure is None else round(statistics.median(measure() for _ in range(repeats)), 4)
