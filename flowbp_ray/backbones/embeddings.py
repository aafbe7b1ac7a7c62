"""Encoding of prompts to embeddings: each distinct text once, alone, or from the cache on disk.

Each text gets a forward of its own. In a batch its bits would depend on the other texts (the pooled embeddings of the
embedded model do), and a run would depend on which texts its cache already had.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowbp_ray.backbones.base import Conditioning, Encode, padded
from flowbp_ray.backbones.embedding_cache import EmbeddingCache
from flowbp_ray.backbones.registry import build_backbone
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.config.sections import BackboneConfig, EncoderConfig
from flowbp_ray.messages import Encoded, Packed, pack_all, unpack_all
from flowbp_ray.utils import accelerator
from flowbp_ray.utils.files import cache_folder
from flowbp_ray.utils.random import use_deterministic_kernels

EMPTY = -1
"""The id of the empty prompt, which is the negative branch's."""


class Encoder:
    """Encodes texts one by one. It loads the text encoders at the first text that is not in the cache."""

    def __init__(self, backbone: BackboneConfig, encoder: EncoderConfig, deterministic: bool = False) -> None:
        """deterministic: use deterministic kernels only, on a GPU."""
        self.threads, self.device = encoder.threads, encoder.device
        self.backbone = build_backbone(backbone)
        root, computes_on = cache_folder(encoder.cache), _computes_on(encoder.device, deterministic)
        self.cache = None if root is None else EmbeddingCache(root, self.backbone, self.threads, computes_on)
        self.loaded: Encode | None = None
        self.found = self.encoded = self.nbytes = 0
        self.seen: set[str] = set()

    def __call__(self, text: str) -> Conditioning:
        """The conditioning [1, ...] of `text`, each tensor in the dtype of the encoders' output.

        What the cache has is read-only memory, the mapped file.
        """
        counts = text not in self.seen
        self.seen.add(text)
        tensors = None if self.cache is None else self.cache.read(text)
        if tensors is None:
            tensors = self._encode(text)
            self.encoded += counts
            if self.cache is not None:
                self.cache.write(text, tensors)
        else:
            self.found += counts
        self.nbytes += counts * sum(tensor.nbytes for tensor in tensors.values())
        return tensors

    def _encode(self, text: str) -> Conditioning:
        with _threads(self.threads):
            if self.loaded is None:
                self.loaded = self.backbone.load_encoder(self.device)
            return self.loaded(text)

    def report(self) -> Encoded:
        """A report on the texts so far, each counted once."""
        broken, folder = ((), None) if self.cache is None else (tuple(self.cache.broken), self.cache.folder)
        return Encoded(self.found, self.encoded, self.nbytes, broken, folder)


def _computes_on(device: str, deterministic: bool) -> str:
    """The device as a part of the cache's key: "cpu", or the GPU's name and whether its kernels are deterministic.

    Deterministic kernels are set here.
    """
    if device == "cpu":
        return "cpu"
    if deterministic:
        use_deterministic_kernels()
    return accelerator.name() + (", deterministic" if deterministic else "")


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Set the number of torch threads inside the context, because it affects the bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Embeddings:
    """Encoded prompts by id, in their own lengths: name -> [1, ...]. EMPTY is the id of the empty (negative) prompt."""

    prompts: Mapping[int, Conditioning]

    def rows(self, prompt_ids: Sequence[int]) -> Conditioning:
        """Conditioning of these prompts, [len(prompt_ids), ...] each, with zeros after those that are shorter."""
        parts = [self.prompts[i] for i in prompt_ids]
        return {name: _stacked([part[name] for part in parts]) for name in parts[0]}

    def negative(self, rows: int) -> Conditioning:
        """The empty prompt's conditioning, repeated for `rows` rows."""
        return {name: t.expand(rows, *t.shape[1:]) for name, t in self.prompts[EMPTY].items()}


@dataclass(frozen=True)
class PackedEmbeddings:
    """`Embeddings` as a message. ids: the prompt ids of each distinct text; tensors: of each, name -> [1, ...]."""

    ids: tuple[tuple[int, ...], ...]
    tensors: tuple[Mapping[str, Packed], ...]

    @classmethod
    def of(cls, embeddings: Embeddings) -> PackedEmbeddings:
        """Pack each text once, however many ids it has."""
        ids: dict[int, list[int]] = {}
        for prompt, tensors in embeddings.prompts.items():
            ids.setdefault(id(tensors), []).append(prompt)
        packed = tuple(pack_all(embeddings.prompts[same[0]]) for same in ids.values())
        return cls(tuple(map(tuple, ids.values())), packed)

    @staticmethod
    def unpack(parts: Iterable[PackedEmbeddings]) -> Embeddings:
        """The embeddings of all parts together, without a copy."""
        prompts: dict[int, Conditioning] = {}
        for part in parts:
            for ids, packed in zip(part.ids, part.tensors, strict=True):
                prompts |= dict.fromkeys(ids, unpack_all(packed))
        return Embeddings(prompts)

    @property
    def nbytes(self) -> int:
        return sum(packed.nbytes for tensors in self.tensors for packed in tensors.values())


def encode_all(encode: Encode, prompts: Sequence[str], ids: Sequence[int] | None = None) -> Embeddings:
    """Encode the empty prompt and those of `prompts` that `ids` names (None: all), each distinct text once."""
    found: dict[int, Conditioning] = {}
    for text, same in distinct_texts(prompts, range(len(prompts)) if ids is None else ids).items():
        kept = {name: tensor.clone() for name, tensor in encode(text).items()}
        found |= dict.fromkeys(same, kept)
    return Embeddings(found)


def distinct_texts(texts: Sequence[str], ids: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The texts to encode, each with all its ids: the empty prompt, then those of `ids`, in order and once each."""
    found: dict[str, list[int]] = {"": [EMPTY]}
    for i in ids:
        found.setdefault(texts[i], []).append(i)
    return {text: tuple(same) for text, same in found.items()}


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate parts [1, ...] along axis 0, padded with zeros to the longest one along axis 1."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([padded(part, longest) for part in parts])


def build_encoder(config: RunConfig) -> Encoder:
    """Build the encoder of a run in this process."""
    return Encoder(config.backbone, config.encoder, config.cluster.deterministic)
