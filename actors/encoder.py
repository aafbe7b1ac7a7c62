"""The encoder process: encodes each prompt once, then goes."""

from __future__ import annotations

from typing import Any

import ray

from actors.process import prepare
from flowbp_ray.backbones import encode_all, get
from flowbp_ray.config import RunConfig
from flowbp_ray.messages import Packed, pack_all


class EncoderActor:
    """Holds the text encoder only while it is needed."""

    def __init__(self, config: RunConfig) -> None:
        prepare(config, 1)
        self.encoder = get(config.backbone.name, config.backbone.path).load_encoder()

    def encode(self, prompts: list[str]) -> dict[str, Packed]:
        """Embeddings of ["" (the negative prompt), *prompts], stacked: name -> [1 + len(prompts), ...]."""
        return pack_all(encode_all(self.encoder, prompts).tensors)


RemoteEncoder: Any = ray.remote(EncoderActor)
