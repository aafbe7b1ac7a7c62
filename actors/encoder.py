"""The encoder process: it encodes each distinct prompt once, or reads it from the cache; and one that only reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from actors.errors import NotCached
from actors.process import hiding_errors, prepare
from flowbp_ray.backbones.base import Conditioning
from flowbp_ray.backbones.embedding_cache import CachedEmbeddings
from flowbp_ray.backbones.embeddings import Encoder, PackedEmbeddings, build_encoder
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.messages import Encoded, EncodedPart, pack_all


@hiding_errors
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
        began, encoder = time.perf_counter(), self._built()
        part = packed(texts, ids, encoder)
        return _report(encoder.report(), part.nbytes, began), part

    def fill(self, texts: Sequence[str]) -> EncodedPart:
        """Encode some distinct texts into the cache, and return the report only."""
        began, encoder = time.perf_counter(), self._built()
        nbytes = sum(tensor.nbytes for text in texts for tensor in encoder(text).values())
        return _report(encoder.report(), nbytes, began)

    def _built(self) -> Encoder:
        # Not in the constructor: an exception there would reach the driver as the death of the actor.
        self.encoder = self.encoder or build_encoder(self.config)
        return self.encoder


@hiding_errors
class ReaderActor:
    """Reads prompts from the folder that an encoder has filled, on whatever device it computed, and loads no model."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        prepare(config, 1)
        self.cache, self.found, self.nbytes = CachedEmbeddings(folder), 0, 0

    def add(self, texts: Sequence[str], ids: Sequence[tuple[int, ...]]) -> tuple[EncodedPart, PackedEmbeddings]:
        """As the encoder's. Raises NotCached for a text that is not in the cache, or whose file is broken."""
        began = time.perf_counter()
        part = packed(texts, ids, self._read)
        self.found, self.nbytes = self.found + len(texts), self.nbytes + part.nbytes
        return _report(Encoded(self.found, 0, self.nbytes, (), self.cache.folder), part.nbytes, began), part

    def _read(self, text: str) -> Conditioning:
        found = self.cache.read(text)
        if found is None:
            raise NotCached(f"{self.cache.path(text)} is missing or broken")
        return found


def packed(
    texts: Sequence[str], ids: Sequence[tuple[int, ...]], encode: Callable[[str], Conditioning]
) -> PackedEmbeddings:
    """A part: the texts' embeddings, with the prompt ids of each."""
    return PackedEmbeddings(tuple(ids), tuple(pack_all(encode(text)) for text in texts))


def _report(encoded: Encoded, nbytes: int, began: float) -> EncodedPart:
    return EncodedPart(encoded, nbytes, time.perf_counter() - began, ray.get_runtime_context().get_node_id())


RemoteEncoder: Any = ray.remote(EncoderActor)
RemoteReader: Any = ray.remote(ReaderActor)
