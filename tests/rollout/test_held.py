"""Which parts of the embeddings a sampler keeps, and what an item of it gets."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flowbp_ray.backbones.embeddings import EMPTY, Embeddings, PackedEmbeddings
from flowbp_ray.rollout.held import HeldParts, Key

TOKENS = {EMPTY: 1, 0: 3, 1: 2, 2: 2, 3: 4}


def part(*ids: int) -> PackedEmbeddings:
    """Four bytes per token: prompt i has TOKENS[i] of them, all of value i."""
    return PackedEmbeddings.of(Embeddings({i: {"embeds": torch.full((1, TOKENS[i], 1), float(i))} for i in ids}))


def test_parts_are_fetched_once_while_there_is_room_and_the_item_has_all_that_it_names() -> None:
    parts = {"a": part(EMPTY, 0), "b": part(1, 2), "c": part(3)}
    asked: list[list[Key]] = []

    def fetch(keys: Sequence[Key]) -> list[PackedEmbeddings]:
        asked.append(list(keys))
        return [parts[str(key)] for key in keys]

    held = HeldParts(kept=16)  # bytes of a or b or c
    embeddings, nbytes = held.take(["a", "b"], fetch)
    assert asked == [["a", "b"]] and nbytes == 4 * (1 + 3 + 2 + 2)
    rows = embeddings.rows([0, 2, 0])["embeds"][..., 0]
    assert rows.tolist() == [[0, 0, 0], [2, 2, 0], [0, 0, 0]]
    assert embeddings.negative(2)["embeds"][..., 0].tolist() == [[-1], [-1]]
    assert held.take(["a", "b"], fetch)[1] == 0 and len(asked) == 1
    embeddings, nbytes = held.take(["a", "c"], fetch)  # b stays beside them
    assert asked[1:] == [["c"]] and nbytes == 16 and set(embeddings.prompts) == {EMPTY, 0, 3}
    assert held.take(["a", "b"], fetch)[1] == 0 and held.take(["a", "c"], fetch)[1] == 0
    small = HeldParts(kept=0)
    assert [small.take(keys, fetch)[1] for keys in (["a", "b"], ["a", "c"], ["a", "b"])] == [32, 16, 16]
