"""The encoder process: it encodes each distinct prompt once, or reads it from the cache, and then ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from actors.process import prepare
from flowbp_ray.backbones import Conditioning, encode_all
from flowbp_ray.backbones.embeddings import Encoded, Encoder, PackedEmbeddings, build_encoder
from flowbp_ray.config.schema import RunConfig


class EncoderActor:
    """Encodes prompts. It loads the text encoders only if the cache lacks a prompt."""

    def __init__(self, config: RunConfig) -> None:
        prepare(config, config.encoder.threads)
        self.config = config
        self.encoder: Encoder | None = None
        self.done: dict[str, Conditioning] = {}

    def add(self, texts: Sequence[str]) -> Encoded:
        """Encode some distinct texts and keep them; return the report so far.

        The driver sends a few texts per call, so that its timeout applies to these and not to all prompts.
        """
        # Not in the constructor: an exception there would reach the driver as the death of the actor.
        self.encoder = self.encoder or build_encoder(self.config)
        for text in texts:
            self.done[text] = self.encoder(text)
        return self.encoder.report()

    def table(self, prompts: Sequence[str]) -> tuple[bool, PackedEmbeddings]:
        """Return (True, the embeddings of the empty prompt and of `prompts`), which must have been added before.

        The driver waits for the first value, and passes on the second one by reference.
        """
        return True, PackedEmbeddings.of(encode_all(self.done.pop, prompts))


RemoteEncoder: Any = ray.remote(EncoderActor)
