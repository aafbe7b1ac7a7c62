"""The learner's benchmarks on tiny models of the real classes: both sides do the same work, and the meters count."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import learner_step, memory, models, sizes, weight_sync
from benchmarks.learner_step import LIMIT
from benchmarks.meters import attempt, compare, gradients
from benchmarks.problem import by_graph, by_sweep, problem
from tests.backbones import tiny

CPU = torch.device("cpu")
TINY_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
    "projection_dim": 8,
}
PUBLISHED = {"sd35-medium": 2_243_171_520, "flux1-dev": 11_901_408_320}


@pytest.fixture(params=["sd35", "flux1"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[sizes.Size]:
    """The tiny pipelines' configurations as a size, which the commands know as tiny."""
    pipe = tiny.build(request.param)
    transformer, vae = (
        {k: v for k, v in part.config.items() if not k.startswith("_")} for part in (pipe.transformer, pipe.vae)
    )
    made = sizes.Size("tiny", request.param, transformer, vae, TINY_VISION, 5, 3.5, 64, 1, "float32")
    monkeypatch.setitem(sizes.SIZES, "tiny", made)
    yield made


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_true_sizes_are_the_published_ones(name: str) -> None:
    assert sum(p.numel() for p in sizes.SIZES[name].backbone().skeleton().parameters()) == PUBLISHED[name]


def test_the_size_for_a_cpu_has_100_million_parameters() -> None:
    count = sum(p.numel() for p in sizes.SIZES["sd3-100m"].backbone().skeleton().parameters())
    assert count == pytest.approx(100e6, rel=0.03)


@pytest.mark.parametrize("method", ["flowbp_sparse", "flowbp_bridge"])
def test_both_sides_give_one_gradient(size: sizes.Size, method: str) -> None:
    m = models.build(size, CPU, torch.float32, 64)
    found = {}
    for checkpointing in (False, True):
        m.checkpointing(checkpointing)
        p = problem(m, rows=2, k=3, method=method)
        by_sweep(p)
        found[checkpointing] = gradients(m.transformer)
        assert any(g.any() for g in found[checkpointing].values())
        by_graph(p)  # through the decoder and the reward, by autograd alone
        assert compare(m.transformer, found[checkpointing])["relative_l2"] <= LIMIT
    for name, g in found[False].items():
        assert torch.allclose(found[True][name], g, rtol=1e-4, atol=1e-9 + 1e-5 * float(g.abs().max())), name


def test_memory_prints_every_setting_and_the_sweep_is_constant_in_k(size: sizes.Size) -> None:
    arguments = ["--model", "tiny", "--micro-batch", "1", "2", "-k", "1", "3"]
    found = memory.result(arguments)
    json.dumps(found)
    assert found["command"] == f"python -m benchmarks.memory {' '.join(arguments)}" and found["meter"] == "saved"
    rows = found["rows"]
    assert [(row["micro_batch"], row["checkpointing"], row["k"]) for row in rows] == [
        (b, False, k) for b in (1, 2) for k in (1, 3)
    ]
    for one, three in ((rows[0], rows[1]), (rows[2], rows[3])):
        assert three["sweep_mib"] == one["sweep_mib"] > 0
        assert three["k_graph_mib"] > one["k_graph_mib"] > one["sweep_mib"]  # decoder and reward, then K graphs
    assert rows[2]["sweep_mib"] > rows[0]["sweep_mib"]


def test_allocated_counts_gradients_and_what_checkpointing_frees(size: sizes.Size) -> None:
    arguments = ["--model", "tiny", "--checkpointing", "off", "on", "-k", "1", "3", "--meter", "allocated"]
    found = memory.result(arguments)
    off_1, off_3, on_1, on_3 = found["rows"]
    assert on_3["sweep_mib"] < off_3["sweep_mib"] and on_3["k_graph_mib"] < off_3["k_graph_mib"]
    assert off_3["sweep_mib"] > 2 * 4 * found["parameters"] / 2**20
    for one, three in ((off_1, off_3), (on_1, on_3)):
        assert three["sweep_mib"] == pytest.approx(one["sweep_mib"], rel=0.02)
        assert three["k_graph_mib"] > three["sweep_mib"]


def test_learner_step_compares_gradients_and_precisions(size: sizes.Size) -> None:
    found = learner_step.result(["--model", "tiny", "-k", "2", "--pairs", "1", "--parity"])
    json.dumps(found)
    assert found["dtype"] == "float32" and not learner_step.apart(found)
    assert [row["method"] for row in found["rows"]] == ["flowbp_sparse", "flowbp_bridge"]
    assert found["flowbp_bridge"] == found["rows"][1] and found["rows"][0]["ratio"] > 0
    sides = found["parity"]
    assert sides["k_graph_fp32"]["relative_l2"] <= LIMIT
    for name in ("sweep_bf16", "k_graph_bf16"):
        assert 1e-4 < sides[name]["relative_l2"] < 0.2 and sides[name]["cosine"] > 0.98, (name, sides[name])


def test_everything_may_be_bf16(size: sizes.Size) -> None:
    found = learner_step.result(["--model", "tiny", "--dtype", "bfloat16", "-k", "2", "--pairs", "1"])
    assert found["dtype"] == "bfloat16"
    assert all(row["relative_difference_of_gradients"] < 0.1 for row in found["rows"])


def test_gradients_that_differ_are_reported() -> None:
    row = {"relative_difference_of_gradients": 2e-5}
    assert learner_step.apart({"dtype": "float32", "rows": [row]}) == [2e-5]
    assert learner_step.apart({"dtype": "bfloat16", "rows": [row]}) == []


def test_what_does_not_fit_is_none_and_other_errors_are_raised() -> None:
    assert attempt(lambda: torch.empty(2**60), CPU) is None
    assert attempt(lambda: 3, CPU) == 3
    with pytest.raises(RuntimeError, match="size"):
        attempt(lambda: torch.zeros(2) + torch.zeros(3), CPU)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "cuda:99"], "CUDA devices; write --device cpu"),
        (["--device", "gpu"], "write --device cpu or --device cuda"),
        (["-k", "0"], "-k must be at least 1 and at most 25"),
        (["--micro-batch", "0"], "--micro-batch must be at least 1"),
        (["--pixels", "100"], "write height: 96 or 112, got 100"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory.result(arguments)


@pytest.mark.ray
@pytest.mark.long
def test_weight_sync_publishes_and_loads_every_size(local_ray: Any) -> None:
    """Whether what was loaded is what was published it checks itself; seconds are no test here."""
    found = weight_sync.result(["--mb", "0.5", "30", "--pairs", "1"])
    json.dumps(found)
    assert [(row["bytes"], row["objects"], len(row["ratios"])) for row in found["rows"]] == [
        (500_000, 1, 1),
        (30_000_000, 1, 1),
    ]
    assert weight_sync.table(found["rows"]).count("\n") == 3
    with pytest.raises(ValueError, match="--mb and --pairs must be above 0"):
        weight_sync.result(["--mb", "0"])
