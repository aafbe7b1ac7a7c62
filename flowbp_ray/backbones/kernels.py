"""How the transformer computes: compiled blocks (`backbone.compile`), and the attention kernel (`backbone.attention`).

Both change speed and, by rounding, the last bits of a velocity; samplers and learners always use the same.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from typing import Any, Literal

from torch import nn

from flowbp_ray.config.sections import Attention
from flowbp_ray.utils.files import cache_path

GRAPHS = 64
"""Graphs that torch may make of one function: kinds of blocks × (one row or more) × (gradient or none) × (adapters on
or off)."""

REPEATED = {"SD3Transformer2DModel": ["JointTransformerBlock"]}
"""Repeated blocks of the classes for which diffusers names none (`_repeated_blocks`)."""


def check_attention(attention: Attention | None) -> None:
    """Raises ValueError if the kernel's package is missing or too old here. Whether a GPU has it shows only there."""
    if attention is None:
        return
    from diffusers.models import attention_dispatch as dispatch

    try:
        dispatch._check_attention_backend_requirements(dispatch.AttentionBackendName(attention))
    except (RuntimeError, ImportError) as error:
        raise ValueError(_unusable(attention, error)) from error


def _unusable(attention: Attention, error: Exception) -> str:
    return f"backbone.attention={attention} cannot be used here: {' '.join(str(error).split())}"


def repeated_blocks(transformer: nn.Module) -> list[nn.Module]:
    """The blocks of which the transformer mostly consists, in order. Raises ValueError if none of it are known."""
    cls = type(transformer).__name__
    names = getattr(transformer, "_repeated_blocks", None) or REPEATED.get(cls, [])
    found = [module for module in transformer.modules() if type(module).__name__ in names]
    if not found:
        raise ValueError(f"backbone.compile=blocks: the repeated blocks of {cls} are not known; write compile=null")
    return found


def use_kernels(transformer: Any, compiled: Literal["blocks"] | None, attention: Attention | None) -> None:
    """Compile the repeated blocks of a diffusers transformer and choose its attention kernel, in place.

    Blocks of a kind share their graphs, which are dynamic: one serves all numbers of rows above one and all lengths.
    There are others for one row (torch always specialises there), without gradient, with adapters off, and for each
    kind of block, so torch's limit of 8 is raised: what is beyond it would not be compiled.
    Raises ValueError for a kernel that cannot be used here.
    """
    if attention is not None:
        if not any(hasattr(processor, "_attention_backend") for processor in _processors(transformer)):
            raise ValueError(
                f"backbone.attention={attention}: {type(transformer).__name__} of diffusers has one attention only, "
                "torch's; write attention=null"
            )
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

        quiet = logging.getLogger("diffusers.models.modeling_utils")
        level, others = quiet.level, registry.get_active_backend()[0]
        quiet.setLevel(logging.ERROR)  # it warns that the dispatcher is experimental
        try:
            transformer.set_attention_backend(attention)
        except (RuntimeError, ImportError) as error:
            raise ValueError(_unusable(attention, error)) from error
        finally:
            quiet.setLevel(level)
            registry.set_active_backend(others)  # diffusers sets it for all models of the process
    if compiled is not None:
        from torch._dynamo import config as dynamo

        keep_own_code()
        dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
        for block in repeated_blocks(transformer):
            block.compile(dynamic=True)


def keep_own_code() -> None:
    """Have torch keep compiled code beside the embedding cache, unless TORCHINDUCTOR_CACHE_DIR says where.

    It unpickles and runs what it finds there, and its default is a folder in /tmp whose name everybody knows.
    """
    with suppress(ValueError):  # a user without a home
        if (cache := cache_path("auto")) is not None:
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache.with_name("inductor")))


def _processors(transformer: nn.Module) -> list[Any]:
    return [module.processor for module in transformer.modules() if hasattr(module, "processor")]
