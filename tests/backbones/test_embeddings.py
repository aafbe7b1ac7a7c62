"""The cache on disk gives the bits that the encoders give, finds them by content, and mends what is broken."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowbp_ray.backbones import Backbone, Conditioning, Embeddings, encode_all
from flowbp_ray.backbones.embedding_cache import EmbeddingCache, identity
from flowbp_ray.backbones.embeddings import EMPTY, PackedEmbeddings, build_encoder
from flowbp_ray.backbones.flux2 import Flux2Backbone
from flowbp_ray.backbones.registry import BACKBONES, backbone_named
from flowbp_ray.config import loading
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.local import encode, fill_cache
from flowbp_ray.utils import files
from flowbp_ray.utils.digest import file_digest
from flowbp_ray.utils.files import cache_folder
from tests.backbones import tiny
from tests.conftest import Saved
from tests.small import small_config

PROMPTS = ["a red circle", "two blue squares above the green circle", "a red circle", "", "a circle of green on red"]
DISTINCT = 4  # the empty one among them


def config_of(name: str, folder: Path, cache: Path | None, **encoder: Any) -> RunConfig:
    """A run on the diffusers folder `folder`; only what concerns encoding matters here."""
    return loading.validate(
        {
            "name": "tiny",
            "steps": 1,
            "backbone": {"name": name, "path": str(folder), "num_steps": 4},
            "method": {"name": "refl", "last": 1},
            "data": {"prompts": "shapes:train", "prompts_per_step": 1, "rollout_batch": 1},
            "encoder": {"cache": None if cache is None else str(cache), **encoder},
            "rewards": {"terms": [{"name": "shapes_clip"}]},
            "learners": {"engine": "torch", "micro_batch": 1},
        }
    )


def equal(one: Conditioning, two: Conditioning) -> bool:
    """Bit for bit, with the same names and dtypes."""
    return one.keys() == two.keys() and all(one[k].dtype == two[k].dtype and torch.equal(one[k], two[k]) for k in one)


def same(one: Embeddings, two: Embeddings) -> bool:
    """Bit for bit, prompt by prompt."""
    return one.prompts.keys() == two.prompts.keys() and all(equal(one.prompts[i], two.prompts[i]) for i in one.prompts)


def refuse(*arguments: object) -> Any:
    raise AssertionError("the text encoders were loaded")


def encoder_class(name: str) -> type[Backbone]:
    return BACKBONES[name]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_cached_is_fresh_whatever_was_encoded_when(
    saved: Saved, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(name)[0]
    fresh = encode(config_of(name, folder, None), PROMPTS)
    config = config_of(name, folder, tmp_path)
    first = fill_cache(config, PROMPTS[1:2])  # another company than in the run
    assert (first.found, first.encoded) == (0, 2)
    assert same(encode(config, PROMPTS), fresh)  # some from the disk, some not
    monkeypatch.setattr(encoder_class(name), "load_encoder", refuse)
    assert same(encode(config, PROMPTS), fresh)
    again = fill_cache(config, PROMPTS)
    assert (again.found, again.encoded, again.broken) == (DISTINCT, 0, ())
    assert len(list(tmp_path.rglob("*.safetensors"))) == DISTINCT and not list(tmp_path.rglob("*.partial"))


def test_each_distinct_prompt_is_encoded_and_held_once() -> None:
    asked: list[str] = []

    def encoded(text: str) -> Conditioning:
        asked.append(text)
        return {"embeds": torch.full((1, 1 + len(text), 2), float(len(text))), "pooled": torch.tensor([[len(text)]])}

    table = encode_all(encoded, ["aa", "b", "aa", ""])
    assert asked == ["", "aa", "b"]
    assert table.prompts[0] is table.prompts[2] and table.prompts[3] is table.prompts[EMPTY]
    assert [table.prompts[i]["embeds"].shape for i in (EMPTY, 0, 1)] == [(1, 1, 2), (1, 3, 2), (1, 2, 2)]
    rows = table.rows([2, 1, 3, 0])
    assert rows["pooled"].flatten().tolist() == [2, 1, 0, 2]
    assert rows["embeds"][..., 0].tolist() == [[2, 2, 2], [1, 1, 0], [0, 0, 0], [2, 2, 2]]
    assert table.negative(2)["pooled"].flatten().tolist() == [0, 0]
    packed = PackedEmbeddings.of(table)
    assert packed.ids == ((EMPTY, 3), (0, 2), (1,)) and packed.nbytes == 4 * 2 * (1 + 3 + 2) + 3 * 8
    back = PackedEmbeddings.unpack([packed])
    assert back.prompts.keys() == table.prompts.keys() and all(equal(back.rows([i]), table.rows([i])) for i in range(4))
    few = encode_all(encoded, ["aa", "b", "c", "d"], [3, 0])
    assert list(few.prompts) == [EMPTY, 3, 0] and asked[3:] == ["", "d", "aa"]


@pytest.fixture
def copy(saved: Saved, tmp_path: Path) -> Path:
    """A folder of flux2 that may be changed."""
    shutil.copytree(saved("flux2")[0], tmp_path / "model")
    return tmp_path / "model"


def change_weight(component: Path) -> None:
    """One element of one tensor, in place: the file keeps its size."""
    file = next(component.glob("*.safetensors"))
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def append_space(file: Path) -> None:
    file.write_text(file.read_text() + " ")


CHANGES: dict[str, tuple[Callable[[Path], None], bool]] = {
    "weights of the encoder": (lambda model: change_weight(model / "text_encoder"), True),
    "config of the encoder": (lambda model: append_space(model / "text_encoder" / "config.json"), True),
    "tokenizer": (lambda model: append_space(model / "tokenizer" / "tokenizer.json"), True),
    "weights of the transformer": (lambda model: change_weight(model / "transformer"), False),
    "scheduler": (lambda model: append_space(model / "scheduler" / "scheduler_config.json"), False),
}


@pytest.mark.parametrize("what", sorted(CHANGES))
def test_the_key_is_what_the_encoders_files_hold(saved: Saved, copy: Path, tmp_path: Path, what: str) -> None:
    """Wherever they are; and nothing else of the model's folder."""

    def key(folder: Path) -> str:
        return identity(backbone_named("flux2", str(folder)), 1, "cpu", tmp_path / "files")

    assert key(copy) == key(saved("flux2")[0])
    change, counts = CHANGES[what]
    change(copy)
    assert (key(copy) != key(saved("flux2")[0])) == counts


def test_the_key_has_the_prompt_the_hidden_layers_and_the_threads(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = backbone_named("flux2", str(saved("flux2")[0]))
    cache = EmbeddingCache(tmp_path, backbone, 1)
    assert len({cache.path(prompt) for prompt in PROMPTS}) == DISTINCT
    assert cache.path("a red circle") == EmbeddingCache(tmp_path, backbone, 1).path("a red circle")
    assert cache.folder != EmbeddingCache(tmp_path, backbone, 2).folder
    config = config_of("flux2", saved("flux2")[0], tmp_path)
    before = encode(config, PROMPTS)
    monkeypatch.setattr(Flux2Backbone, "text_layers", (9, 18, 26))
    assert cache.folder != EmbeddingCache(tmp_path, backbone, 1).folder
    after = encode(config, PROMPTS)
    assert not torch.equal(after.rows([0])["prompt_embeds"], before.rows([0])["prompt_embeds"])
    assert json.loads((EmbeddingCache(tmp_path, backbone, 1).folder / "encoder.json").read_text())["settings"] == {
        "family": "flux2",
        "pipeline": "Flux2KleinPipeline",
        "text_layers": [9, 18, 26],
    }


def truncate(file: Path, other: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def empty(file: Path, other: Path) -> None:
    file.write_bytes(b"")


def flip(file: Path, other: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))


def exchange(file: Path, other: Path) -> None:
    shutil.copy(other, file)


def test_what_the_cache_has_is_mapped_and_not_copied(tmp_path: Path) -> None:
    """The tensors' addresses lie in the file's mapping, as the system lists it."""
    config = small_config(tmp_path, "flowbp_sparse", f"encoder.cache={tmp_path}")
    fill_cache(config, ["a red circle"])
    encoder = build_encoder(config)
    assert encoder.cache is not None
    tensors, file = encoder("a red circle"), str(encoder.cache.path("a red circle"))
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(file)]
    places = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    assert tensors and all(any(a <= t.data_ptr() < b for a, b in places) for t in tensors.values())


@pytest.mark.parametrize("damage", [truncate, empty, flip, exchange])
def test_a_broken_file_is_encoded_again(
    saved: Saved, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path, Path], None]
) -> None:
    config = config_of("sd35", saved("sd35")[0], tmp_path)
    fresh = encode(config, PROMPTS)
    cache = build_encoder(config).cache
    assert cache is not None
    bad = cache.path(PROMPTS[0])
    damage(bad, cache.path(PROMPTS[1]))
    with caplog.at_level(logging.WARNING):
        report = fill_cache(config, PROMPTS)
    assert (report.found, report.encoded, report.broken) == (DISTINCT - 1, 1, (bad,))
    [record] = [r for r in caplog.records if r.name == "flowbp_ray.backbones.embedding_cache"]
    assert f"{bad} is broken and is encoded again" in record.getMessage()
    assert same(encode(config, PROMPTS), fresh) and fill_cache(config, PROMPTS).encoded == 0


def test_the_encoders_are_freed_and_the_threads_given_back(saved: Saved, tmp_path: Path) -> None:
    from transformers import T5EncoderModel

    def alive() -> int:
        gc.collect()
        return sum(type(thing) is T5EncoderModel for thing in gc.get_objects())

    folder, threads = saved("sd35")[0], torch.get_num_threads()
    before = alive()
    encoder = build_encoder(config_of("sd35", folder, None))
    encoder("a red circle")
    assert alive() == before + 1
    del encoder
    fill_cache(config_of("sd35", folder, tmp_path, threads=threads + 1), PROMPTS)
    assert alive() == before and torch.get_num_threads() == threads


def test_digests_of_large_files_are_remembered_until_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, memory = tmp_path / "weights", tmp_path / "files"
    file.write_bytes(b"0123456789")
    assert file_digest(file, memory) == hashlib.sha256(b"0123456789").hexdigest() and not memory.exists()
    monkeypatch.setattr(files, "LARGE", 10)
    assert file_digest(file, memory) == hashlib.sha256(b"0123456789").hexdigest()
    [note] = memory.iterdir()
    note.write_text("f" * 64)
    assert file_digest(file, memory) == "f" * 64  # not read again
    stat = file.stat()
    file.write_bytes(b"9876543210")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a copy that keeps times would leave it
    assert file_digest(file, memory) == hashlib.sha256(b"9876543210").hexdigest()


def test_what_a_user_gets_wrong(saved: Saved, tmp_path: Path) -> None:
    folder = saved("flux1")[0]
    with pytest.raises(ValueError, match=r"encoder\.cache is null, .* write encoder\.cache=auto"):
        fill_cache(config_of("flux1", folder, None), PROMPTS)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written .* write another encoder\.cache"):
        encode(config_of("flux1", folder, tmp_path / "file" / "cache"), PROMPTS)
    shutil.copytree(folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "tokenizer_2")
    with pytest.raises(ValueError, match="has no tokenizer_2: the folder tokenizer_2/ is missing"):
        encode(config_of("flux1", tmp_path / "model", tmp_path / "cache"), PROMPTS)


def test_the_folder_that_auto_means(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLOWBP_RAY_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found = []
    for name in ("FLOWBP_RAY_CACHE", "XDG_CACHE_HOME", "HOME"):
        found.append(cache_folder("auto"))
        monkeypatch.delenv(name)
    below = ("own/embeddings", "xdg/flowbp_ray/embeddings", "home/.cache/flowbp_ray/embeddings")
    assert found == [tmp_path / folder for folder in below]
    assert cache_folder(None) is None
