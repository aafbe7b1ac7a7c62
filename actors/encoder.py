"""The encoder process: encodes each prompt once, then goes."""

from __future__ import annotations

from typing import Any

import ray

from actors.process import limit_threads
from flowbp_ray.backbones import get
from flowbp_ray.config import RunConfig
from flowbp_ray.messages import Packed, pack_all

CHUNK = 256


class EncoderActor:
    """Holds the text encoder only while it is needed."""

    def __init__(self, config: RunConfig) -> None:
        limit_threads(1)
        self.encode_chunk = get(config.backbone.name, config.backbone.path).load_encoder()

    def encode(self, prompts: list[str]) -> dict[str, Packed]:
        """Embeddings of ["" (the negative prompt), *prompts], stacked: name -> [1 + len(prompts), ...]."""
        import torch

        texts = ["", *prompts]
        parts = [self.encode_chunk(texts[i : i + CHUNK]) for i in range(0, len(texts), CHUNK)]
        return pack_all({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


RemoteEncoder: Any = ray.remote(EncoderActor)
