"""The encoder process: it encodes each distinct prompt once, or reads it from the cache, and then ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray

from actors.process import prepare
from flowbp_ray.backbones.embeddings import Encoder, PackedEmbeddings, build_encoder
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.messages import EncodedPart, pack_all


class EncoderActor:
    """Encodes prompts and keeps none. It loads the text encoders only if the cache lacks a prompt."""

    def __init__(self, config: RunConfig) -> None:
        prepare(config, config.encoder.threads)
        self.config = config
        self.encoder: Encoder | None = None

    def add(self, texts: Sequence[str], ids: Sequence[tuple[int, ...]]) -> tuple[EncodedPart, PackedEmbeddings]:
        """Encode some distinct texts; return the report so far, and the part. ids: the prompt ids of each text.

        The driver sends a few texts per call, so that its timeout applies to these and not to all prompts.
        """
        began = time.perf_counter()
        # Not in the constructor: an exception there would reach the driver as the death of the actor.
        self.encoder = self.encoder or build_encoder(self.config)
        part = PackedEmbeddings(tuple(ids), tuple(pack_all(self.encoder(text)) for text in texts))
        return EncodedPart(self.encoder.report(), part.nbytes, time.perf_counter() - began), part


RemoteEncoder: Any = ray.remote(EncoderActor)
