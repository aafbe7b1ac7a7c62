"""What `plan` says of the encoding of prompts: their number, bytes and time, and when it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flowbp_ray.backbones.embedding_cache import EmbeddingCache
from flowbp_ray.planning.costs import Costs
from flowbp_ray.planning.encoding import (
    PromptEncoding,
    check_time,
    count_prompts,
    most_held,
    prompt_encoding,
    refusal,
)
from flowbp_ray.planning.memory import Sizes
from flowbp_ray.utils.units import GIB
from tests.planning.common import config_of, write
from tests.test_cli import call

T5_XXL = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
}
T5_XXL |= {"vocab_size": 32128, "feed_forward_proj": "gated-gelu", "torch_dtype": "float16"}
CPU = ["encoder.gpus=0", "encoder.threads=2"]


@pytest.fixture(scope="module")
def large(folders: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD3.5 with the configuration of T5-XXL."""
    folder = Path(shutil.copytree(folders("sd35")[1], tmp_path_factory.mktemp("large") / "model"))
    (folder / "text_encoder_3" / "config.json").unlink()
    write(folder, "text_encoder_3", T5_XXL)
    return folder


def planned(folder: Path, *overrides: str) -> tuple[PromptEncoding, str | None]:
    config = config_of("sd35", folder, *overrides)
    costs = Costs(config)
    sizes = Sizes.of(config, costs)
    found = prompt_encoding(config, costs, sizes)
    return found, refusal(config, found, sizes, 24 * GIB)


def test_only_prompts_that_are_drawn_count(large: Path, tmp_path: Path) -> None:
    """107,515 lines, of which 300 steps of 16 draw 4,800; without the file that is the bound."""
    file = tmp_path / "train.txt"
    file.write_text("".join(f"prompt {i}\n" for i in range(107_515)))
    here = config_of("sd35", large, f"data.prompts={file}", "evaluation.prompts=null")
    assert count_prompts(here) == (4801, True)
    assert count_prompts(config_of("sd35", large, "data.prompts=away.txt", "evaluation.limit=7")) == (4808, False)
    file.write_text("a\nb\na\n")
    assert count_prompts(here) == (3, True)


def test_the_time_is_two_operations_per_parameter_and_token(large: Path) -> None:
    found, refused = planned(large)
    assert found.prompts == 4803 and not found.counted and refused is None
    assert found.nbytes == 4803 * found.per_prompt
    t5 = 2 * 333 * 4_762_310_656
    assert t5 < found.flops < 1.01 * t5
    assert found.seconds == 4803 * found.flops / 1e14
    assert planned(large, *CPU)[0].seconds == 4803 * found.flops / 2e10


def test_a_large_text_encoder_on_two_threads_is_refused_in_a_line(large: Path) -> None:
    line = "text encoders of 4.8 B parameters would take about 8.8 days for 4,803 prompts on 2 CPU threads"
    assert planned(large, *CPU)[1] == f"{line}: write encoder.gpus=1 (encoder.longest=null allows it)"
    short = planned(large, *CPU, "steps=4")[1]
    assert short is not None and "write encoder.gpus=1 or encoder.threads=6 (" in short
    assert planned(large, *CPU, "encoder.longest=null")[1] is None
    assert planned(large, "steps=4", "encoder.gpus=0", "encoder.threads=6")[1] is None
    half = planned(large, "encoder.gpus=0.25")[1]
    assert half == "the text encoders of 4.8 B parameters need 10.4 GiB of 6.0 GiB: write encoder.gpus=1"


def test_a_run_is_refused_before_it_starts_unless_the_cache_has_its_prompts(large: Path, tmp_path: Path) -> None:
    at = [*CPU, f"encoder.cache={tmp_path}"]
    config, texts = config_of("sd35", large, *at), [f"prompt {i}" for i in range(100)]
    with pytest.raises(
        ValueError, match=r"take about 4.4 hours for 100 prompts on 2 CPU threads: write encoder.gpus=1"
    ):
        check_time(config, texts)
    check_time(config, texts[:20])
    check_time(config_of("sd35", large, *at, "encoder.longest=null"), texts)
    check_time(config_of("sd35", large, *at, "encoder.gpus=1"), texts)
    cache = EmbeddingCache(tmp_path, Costs(config).backbone, 2)
    cache.folder.mkdir()
    for text in texts[:80]:
        cache.path(text).touch()
    check_time(config, texts)


def test_what_is_in_the_store_is_a_window_of_steps(large: Path, tmp_path: Path) -> None:
    """16 prompts a step: the step in progress, two ahead, the evaluation's and the empty one; without a cache all."""
    (tmp_path / "held_out.txt").write_text("a\nb\nc\n")
    few = ["encoder.ahead=2", "evaluation.limit=null", f"evaluation.prompts={tmp_path / 'held_out.txt'}"]
    assert most_held(config_of("sd35", large, *few), 4803) == 1 + 3 * 16 + 3
    assert most_held(config_of("sd35", large, *few, "staleness=1"), 4803) == 1 + 4 * 16 + 3
    assert most_held(config_of("sd35", large, *few), 20) == 20
    assert most_held(config_of("sd35", large, *few, "encoder.cache=null"), 4803) == 4803


def test_the_command_exits_with_the_line(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["backbone.dtype=float32", "backbone.height=64", "backbone.width=64", "evaluation.limit=2"]
    small += ["data.prompts_per_step=16", "data.rollout_batch=2", "learners.micro_batch=2", "backbone.num_steps=4"]
    assert call("plan", "sd35_refl", f"backbone.path={large}", *small, "method.last=1", *CPU, "--json") == 1
    said = capsys.readouterr()
    assert said.err.startswith("flowbp-ray: text encoders of 4.8 B parameters would take about 8.8 days")
    assert len(said.err.strip().splitlines()) == 1
    plain = json.loads(said.out)
    assert plain["encoding"]["prompts"] == 4803 and not plain["verdict"]["fits"]
