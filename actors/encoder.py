"""The encoder process: encodes each distinct prompt once, or reads it from the cache, then goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from actors.process import prepare
from flowbp_ray.backbones import Conditioning, encode_all
from flowbp_ray.backbones.embeddings import Encoded, Encoder, PackedEmbeddings
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.local import build_encoder


class EncoderActor:
    """Holds the text encoders only while they are needed, and not at all where the cache has every prompt."""

    def __init__(self, config: RunConfig) -> None:
        prepare(config, config.encoder.threads)
        self.config = config
        self.encoder: Encoder | None = None
        self.done: dict[str, Conditioning] = {}

    def add(self, texts: Sequence[str]) -> Encoded:
        """Encode some distinct texts and keep them: a part of the work, so that a slow encoder is not a silent one."""
        self.encoder = self.encoder or build_encoder(self.config)  # here, where an error keeps its name
        for text in texts:
            self.done[text] = self.encoder(text)
        return self.encoder.report()

    def table(self, prompts: Sequence[str]) -> tuple[bool, PackedEmbeddings]:
        """Of the empty prompt and `prompts`, which were added. The driver waits for the first and leaves the second."""
        return True, PackedEmbeddings.of(encode_all(self.done.pop, prompts))


RemoteEncoder: Any = ray.remote(EncoderActor)
