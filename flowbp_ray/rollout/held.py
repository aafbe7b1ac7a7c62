"""What a sampler keeps of the run's embeddings: the parts that its item needs, and the latest others up to a size."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from flowbp_ray.backbones.embeddings import Embeddings, PackedEmbeddings

Key = Hashable
"""Names a part: some prompts that were encoded together."""
FetchParts = Callable[[Sequence[Key]], Sequence[PackedEmbeddings]]
"""Fetches the parts that the keys name, in their order."""

KEPT = 64 * 2**20
"""Bytes of parts that are kept besides those of the current item."""


class HeldParts:
    """Parts of the embeddings by key; the ones that were used longest ago go first."""

    def __init__(self, kept: int = KEPT) -> None:
        """kept: bytes of parts that are kept besides those that were taken last."""
        self.kept = kept
        self.parts: dict[Key, PackedEmbeddings] = {}  # in the order of their last use

    def take(self, keys: Sequence[Key], fetch: FetchParts) -> tuple[Embeddings, int]:
        """Return the embeddings of these parts, and how many bytes of them had to be fetched."""
        missing = [key for key in keys if key not in self.parts]
        fetched = dict(zip(missing, fetch(missing), strict=True)) if missing else {}
        wanted = {key: self.parts.pop(key) if key in self.parts else fetched[key] for key in keys}
        room = self.kept
        for key, part in reversed(list(self.parts.items())):
            room -= part.nbytes
            if room < 0:
                del self.parts[key]
        self.parts |= wanted
        return PackedEmbeddings.unpack(wanted.values()), sum(part.nbytes for part in fetched.values())
