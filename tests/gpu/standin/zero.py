"""The stand-in as DeepSpeed's accelerator: DeepSpeed's own for `torch.npu`, without its kernels.

Like that of CUDA it says that operators are not done when they return, so DeepSpeed takes the same ways.
"""

from __future__ import annotations

import os
from typing import Any

from tests.gpu import standin
from tests.gpu.standin import group


def install() -> None:
    """Make the stand-in the accelerator of this process, and of DeepSpeed in it, which must not be imported yet."""
    standin.install()
    group.register()
    os.environ["DS_ACCELERATOR"] = "cpu"  # until there is one; by itself DeepSpeed would look for the package torch_npu
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.npu_accelerator import NPU_Accelerator

    class Accelerator(NPU_Accelerator):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._communication_backend_name = group.NAME

        def create_op_builder(self, class_name: str) -> Any:
            return None

        def get_op_builder(self, class_name: str) -> Any:
            return None

    set_accelerator(Accelerator())
