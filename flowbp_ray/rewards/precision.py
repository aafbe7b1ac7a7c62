"""What `rewards.precision` does in the process that scores, to the decoder and to the rewards' models alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from flowbp_ray.config.rewards import Precision


@contextmanager
def computing(precision: Precision) -> Iterator[None]:
    """Inside it fp32 products are rounded to TF32 for `tf32` and are exact otherwise, in matrices and convolutions.

    PyTorch's own default is exact for matrices and TF32 for convolutions. What the process had is set again afterwards.
    CPUs know no TF32.
    """
    matmul, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolutions.allow_tf32
    matmul.allow_tf32 = convolutions.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, convolutions.allow_tf32 = before


def with_dtype(factory: Callable[..., Any], options: Mapping[str, Any], precision: Precision) -> dict[str, Any]:
    """The options of a reward: at bfloat16 its `dtype` is that, where it takes one and none is written.

    At the other precisions it is the reward's own default: float32, for HPSv3 the bfloat16 that it is published with.
    """
    given = dict(options)
    if precision == "bfloat16" and "dtype" in inspect.signature(factory).parameters:
        given.setdefault("dtype", "bfloat16")
    return given
