"""The state of an engine in files: cut anywhere, read at other boundaries; and what is not whole is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from flowbp_ray.run.engine_state import EngineState, Fragment, moved, write_state
from flowbp_ray.utils.errors import ConfigError
from flowbp_ray.utils.tensor_file import write_bytes, write_tensors

KINDS = ("master", "exp_avg", "exp_avg_sq", "average")
SIZE = 60


def state(seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {kind: torch.randn(SIZE, generator=random) for kind in KINDS}


def write(folder: Path, cuts: list[int], whole: dict[str, Tensor], shape: tuple[int, ...] = (4, 15)) -> None:
    """One rank per interval between two cuts; an empty interval is a rank that owns nothing."""
    for rank, (a, b) in enumerate(pairwise(cuts)):
        cut = {kind: tensor[a:b] for kind, tensor in whole.items()}
        own = [Fragment("w", shape, a, 3, cut)] if a < b else []
        write_state(folder, own, rank, len(cuts) - 1, {"count": len(cuts) - 1})


@settings(max_examples=25)  # each writes and flushes files
@given(st.lists(st.integers(0, SIZE), max_size=4), st.lists(st.integers(0, SIZE), max_size=4))
def test_pieces_are_read_at_other_boundaries(
    tmp_path_factory: pytest.TempPathFactory, wrote: list[int], reads: list[int]
) -> None:
    folder, whole = tmp_path_factory.mktemp("state"), state()
    write(folder, sorted([0, *wrote, SIZE]), whole)
    saved = EngineState(folder)
    saved.check({"w": (4, 15)})
    assert saved.updates("w") == saved.most_updates == 3
    for kind in KINDS:
        for a, b in pairwise(sorted([0, *reads, SIZE])):
            target = torch.full((b - a,), torch.nan)
            saved.fill(target, kind, "w", a)
            assert torch.equal(target, whole[kind][a:b])


@pytest.mark.parametrize(("start", "stop"), [(0, 700), (0, 256), (255, 257), (256, 512), (300, 699), (699, 700)])
def test_moments_in_int8_are_dequantised_in_any_slice(tmp_path: Path, start: int, stop: int) -> None:
    """code[value] · scale of the block of 256 in which an element is."""
    random = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (700,), generator=random, dtype=torch.uint8)
    scales, codes = torch.rand(3, generator=random), torch.randn(256, generator=random)
    tensors = {"master": torch.zeros(700), "exp_avg": values, "exp_avg.scales": scales, "exp_avg.codes": codes}
    write_state(tmp_path, [Fragment("w", (700,), 0, 1, tensors)], 0, 1, {})
    target, saved = torch.empty(stop - start), EngineState(tmp_path)
    saved.fill(target, "exp_avg", "w", start)
    want = [float(codes[int(values[i])] * scales[i // 256]) for i in range(start, stop)]
    assert target.tolist() == want
    assert saved.quantised("exp_avg", "w") and torch.equal(saved.stored("exp_avg", "w"), values)


def test_a_parameter_without_update_has_no_moments(tmp_path: Path) -> None:
    write_state(tmp_path, [Fragment("w", (2,), 0, 0, {"master": torch.ones(2)})], 0, 1, {})
    target, saved = torch.ones(2), EngineState(tmp_path)
    saved.fill(target, "exp_avg", "w")
    assert target.tolist() == [0.0, 0.0] and saved.most_updates == 0
    with pytest.raises(ConfigError, match="holds no average/w; the run that wrote it kept none"):
        saved.fill(target, "average", "w")


def test_what_is_not_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the files of 0 ranks of an unknown number"):
        EngineState(tmp_path)
    write(tmp_path, [0, 20, 60], state())
    with pytest.raises(ConfigError, match=r"is the state of other parameters, e.g. v, w"):
        EngineState(tmp_path).check({"v": (4, 15)})
    with pytest.raises(ConfigError, match=r"is the state of other parameters, e.g. w"):
        EngineState(tmp_path).check({"w": (15, 4)})
    index = tmp_path / "engine" / "rank_0001.json"
    text = index.read_text()
    index.write_text(json.dumps({**json.loads(text), "format": 2}))
    with pytest.raises(ConfigError, match="has format 2, this version reads 1"):
        EngineState(tmp_path)
    index.write_text(text.replace('"length": 40', '"length": 39'))
    with pytest.raises(ConfigError, match="the pieces of w do not cover its 60 elements once"):
        EngineState(tmp_path)
    index.write_text(text[:20])
    with pytest.raises(ConfigError, match=r"rank_0001.json cannot be read"):
        EngineState(tmp_path)
    index.unlink()
    with pytest.raises(ConfigError, match="the files of 1 ranks of 2"):
        EngineState(tmp_path)


def test_who_wrote_it_is_known(tmp_path: Path) -> None:
    write(tmp_path, [0, 20, 60], state())
    assert moved(tmp_path, {"count": 2}) == []
    assert moved(tmp_path, {"count": 1}) == ["learners.count was 2, is 1"]


def test_a_file_is_safetensors_and_its_digest_is_that_of_its_bytes(tmp_path: Path) -> None:
    import hashlib

    random = torch.Generator().manual_seed(0)
    tensors = {
        "odd": torch.randn(3, generator=random).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(5, 7, generator=random).t(),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "großer Name": torch.randn(2, 2, 2, generator=random),
    }
    digest = write_tensors(tmp_path / "file", tensors)
    assert digest == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) and found[key].dtype == tensors[key].dtype for key in tensors)
    assert write_bytes(tmp_path / "plain", b"x") == hashlib.sha256(b"x").hexdigest()
