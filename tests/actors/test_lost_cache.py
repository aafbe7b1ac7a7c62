"""Files of the embedding cache that are damaged or deleted in the course of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

import actors.encoder
from actors.encoder import ReaderActor
from actors.encoding import Encoding
from actors.errors import NotCached
from actors.placement import free, place
from actors.process import REAL
from flowbp_ray import prompts
from flowbp_ray.backbones.embedding_cache import CachedEmbeddings
from flowbp_ray.backbones.embeddings import EMPTY, PackedEmbeddings
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.local import encode, fill_cache
from flowbp_ray.utils.digest import digest
from flowbp_ray.utils.errors import RunFailed
from flowbp_ray.utils.settings import PoolConfig
from tests.small import short_prompts, small_config

COUNT = 16  # prompts, four in each of four steps


def test_a_reader_names_the_file_that_is_missing_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.encoder, "prepare", lambda config, threads: None)  # it would change this process
    config = small_config(tmp_path, "refl", f"encoder.cache={tmp_path / 'cache'}")
    texts = ["a red circle", "a blue square", "a green circle"]
    folder = fill_cache(config, texts).folder
    assert folder is not None
    cache = CachedEmbeddings(folder)
    cache.path(texts[1]).write_bytes(cache.path(texts[0]).read_bytes())  # another prompt's
    cache.path(texts[2]).unlink()
    for text in texts[1:]:
        with pytest.raises(NotCached, match=f"{cache.path(text)} is missing or broken"):
            ReaderActor(config, folder).add([texts[0], text], [(0,), (1,)])


def config_of(tmp_path: Path, cache: Path | None, *settings: str) -> RunConfig:
    there = f"encoder.cache={cache or 'null'}"
    prompted = f"data.prompts={short_prompts(tmp_path, COUNT)}"
    return small_config(tmp_path, "refl", "steps=4", "encoder.ahead=0", there, prompted, *settings)


def filled(config: RunConfig) -> tuple[Encoding, list[str], CachedEmbeddings]:
    """An encoding at step 0 whose cache has all prompts and whose encoder has ended, and the lines that it sends."""
    texts, lines = [record.text for record in prompts.load(config.data.prompts)], list[str]()
    encoding = Encoding(config, texts, prompts.Needs(config, COUNT), REAL, lines.append)
    encoding.finish()
    assert encoding.encoded is not None and encoding.encoded.folder is not None
    assert encoding.encoded.encoded == COUNT + 1 and encoding.process.actor is None
    return encoding, lines, CachedEmbeddings(encoding.encoded.folder)


def ids_of(step: int) -> list[int]:
    return prompts.ids_of_step(COUNT, 4, step, 42)


@pytest.mark.ray
def test_what_the_cache_loses_is_encoded_again_by_one_encoder(local_ray: Any, tmp_path: Path) -> None:
    """A file of step 2 is deleted and one of step 3 cut short; the reader finds the first of them only."""
    encoding, lines, cache = filled(config_of(tmp_path, tmp_path / "cache"))
    gone, cut = (cache.path(encoding.texts[ids_of(step)[1]]) for step in (2, 3))
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    parts: list[PackedEmbeddings] = []
    try:
        for step in (2, 3):
            encoding.advance(step)
            parts += ray.get(encoding.await_refs(ids_of(step)))
            encoding.finish()
        assert encoding.process.actor is None
    finally:
        encoding.end()
    found = PackedEmbeddings.unpack(parts)
    fresh = encode(config_of(tmp_path, None), encoding.texts)
    for i in (EMPTY, *ids_of(2), *ids_of(3)):
        assert digest(found.prompts[i]) == digest(fresh.prompts[i])
    assert [str(gone) in line for line in lines if "is built again" in line] == [True]
    assert encoding.encoded is not None and encoding.encoded.encoded == 2 and cut in encoding.encoded.broken


@pytest.mark.ray
@pytest.mark.long
def test_a_run_without_room_for_the_encoder_ends_with_the_lost_files_name(local_ray: Any, tmp_path: Path) -> None:
    cpus = ray.cluster_resources()["CPU"]
    config = config_of(tmp_path, tmp_path / "cache", f"encoder.cpus={cpus}", "cluster.placement_timeout=5")
    encoding, _, cache = filled(config)
    others = place(PoolConfig(count=1, cpus=cpus), "others", "samplers", 60)
    gone = cache.path(encoding.texts[ids_of(3)[0]])
    gone.unlink()
    try:
        encoding.advance(3)
        with pytest.raises(RunFailed, match=f"{gone} is missing or broken, and the encoder with .* cannot be placed"):
            encoding.finish()
    finally:
        encoding.end()
        free(others)


@pytest.mark.ray
@pytest.mark.long
def test_a_window_that_is_held_is_not_looked_through(local_ray: Any, tmp_path: Path) -> None:
    """`has` of a step in the window reads no prompt; of any other step it does, and fetches what is absent."""
    encoding, _, _ = filled(config_of(tmp_path, tmp_path / "cache"))
    try:
        in_window, outside = encoding.window.start, encoding.window.stop
        texts, encoding.texts = encoding.texts, ()
        assert encoding.has(ids_of(in_window), in_window)
        encoding.texts = texts
        assert not encoding.has(ids_of(outside), outside)
        assert not encoding.has(ids_of(outside))
        encoding.finish()
        assert encoding.has(ids_of(outside), outside) and encoding.has(ids_of(in_window), in_window)
        encoding.lost(encoding.refs(ids_of(in_window)))
        assert not encoding.has(ids_of(in_window), in_window)
    finally:
        encoding.end()
