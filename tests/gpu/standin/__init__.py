"""A stand-in for GPUs: two devices of torch's PrivateUse1 backend whose memory is the host's.

`install()` registers them in this process, for good, and makes them the library's accelerator. They compute with the
CPU's kernels, refuse what CUDA refuses (tensors of two devices in one operator, `.numpy()`, the host's generators),
count what a host would wait for, and meter their memory.
"""

from __future__ import annotations

import contextlib
import types
from collections import Counter
from functools import lru_cache
from typing import Any

import torch

from flowbp_ray.utils import accelerator
from tests.gpu.standin import build

KIND = "npu"
"""The name: safetensors takes only names that it knows."""


@lru_cache(maxsize=1)
def extension() -> Any:
    """The backend, built and registered once per process."""
    made = build.load()
    torch.utils.rename_privateuse1_backend(KIND)
    torch._register_device_module(KIND, _device_module(made))
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return made


def install() -> None:
    """Make it the accelerator of this process; also Ray's `worker_process_setup_hook`."""
    extension()
    accelerator.KIND = KIND


def waits() -> Counter[str]:
    """How often a host would have waited for the devices so far, by what for."""
    return Counter(extension().waits())


def memory(index: int = 0) -> dict[str, int]:
    """Bytes of a device: `live` now, and their `peak` since `reset_peak`."""
    return dict(extension().memory(index))


def reset_peak(index: int = 0) -> None:
    extension().reset_peak(index)


def _device_module(made: Any) -> types.ModuleType:
    """What torch and the library ask `torch.cuda` for, as the module `torch.npu`."""

    class Device:
        """Context manager: the device is current inside."""

        def __init__(self, index: Any) -> None:
            self.index = -1 if index is None else getattr(index, "index", index)

        def __enter__(self) -> None:
            self.before = made.exchange(self.index)

        def __exit__(self, *_: Any) -> None:
            made.exchange(self.before)

    def index_of(device: Any) -> int:
        index = device if isinstance(device, int) or device is None else torch.device(device).index
        return made.current() if index is None else index

    offered = {
        "device": Device,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: made.DEVICES,
        "current_device": made.current,
        "set_device": lambda device: made.exchange(index_of(device)) and None,
        "get_device_name": lambda device=None: "stand-in",
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
        "synchronize": lambda device=None: torch.accelerator.synchronize(index_of(device)),
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: made.memory(index_of(device))["live"],
        "max_memory_allocated": lambda device=None: made.memory(index_of(device))["peak"],
        "reset_peak_memory_stats": lambda device=None: made.reset_peak(index_of(device)),
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        **_for_deepspeed(index_of),
    }
    module = types.ModuleType(f"torch.{KIND}")
    for name, value in offered.items():
        setattr(module, name, value)
    return module


def _for_deepspeed(index_of: Any) -> dict[str, Any]:
    """What DeepSpeed asks for beside."""

    def of(dtype: torch.dtype) -> Any:
        return lambda values: torch.tensor(values, dtype=dtype, device=KIND)

    def stream(device: Any = None) -> Any:
        return torch.accelerator.current_stream(index_of(device))

    return {
        "Stream": lambda device=None: torch.Stream(device=f"{KIND}:{index_of(device)}"),
        "Event": lambda **_: torch.Event(KIND),
        "stream": lambda chosen: contextlib.nullcontext(),
        "current_stream": stream,
        "default_stream": stream,
        "is_bf16_supported": lambda: True,
        "memory_stats": lambda device=None: {},
        "get_device_properties": lambda device=None: types.SimpleNamespace(total_memory=2**40),
        "FloatTensor": of(torch.float32),
        "ByteTensor": of(torch.uint8),
    }
