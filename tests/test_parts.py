"""The small parts, each against something independent."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from scipy import stats

from actors.fleet import counted
from flowbp_ray import prompts
from flowbp_ray.backbones.embeddings import encode
from flowbp_ray.backbones.guidance import full_velocity, trained_velocity
from flowbp_ray.backbones.registry import backbone_named
from flowbp_ray.config.sections import LoraConfig
from flowbp_ray.evaluation.estimates import estimate, paired
from flowbp_ray.messages import Version, pack, unpack
from flowbp_ray.rollout.items import items_of_step
from flowbp_ray.utils.digest import digest
from flowbp_ray.weights import trainable
from tests.small import small_config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64])
def test_packed_tensors_come_back_bit_for_bit_without_a_copy(dtype: torch.dtype) -> None:
    tensor = (torch.randn(3, 5) * 10).to(dtype)
    packed = pack(tensor)
    back = unpack(packed)
    assert back.dtype == dtype and torch.equal(back, tensor)
    assert packed.nbytes == tensor.numel() * dtype.itemsize
    assert back.data_ptr() == packed.array.ctypes.data
    packed.array.flags.writeable = False  # what Ray hands out
    assert torch.equal(unpack(packed), tensor)


def test_versions_are_ordered_by_incarnation_then_step() -> None:
    assert sorted([Version(1, 0), Version(0, 7), Version(0, 2)]) == [Version(0, 2), Version(0, 7), Version(1, 0)]


@pytest.mark.parametrize("accepted", [0, 7, 60])
def test_rates_have_wilsons_interval(accepted: int) -> None:
    got = estimate(np.array([1.0] * accepted + [0.0] * (60 - accepted)))
    want = stats.binomtest(accepted, 60).proportion_ci(0.95, method="wilson")
    assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=1e-12)


def test_means_and_paired_changes_have_the_normal_interval() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=50), rng.normal(0.3, 1, size=50)
    low, high = stats.norm.interval(0.95, loc=(after - before).mean(), scale=stats.sem(after - before))
    got = paired(before, after)
    assert (got.low, got.high) == pytest.approx((low, high))
    low, high = stats.norm.interval(0.95, loc=before.mean(), scale=stats.sem(before))
    assert (estimate(before).low, estimate(before).high) == pytest.approx((low, high))


def test_prompt_files_of_all_kinds_read_the_same(tmp_path: Path) -> None:
    texts = ["a cat", "a dog on a boat"]
    (tmp_path / "p.txt").write_text("\n".join(texts) + "\n\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": t, "skill": "x"}) + "\n" for t in texts))
    parquet.write_table(pa.table({"prompt": texts}), tmp_path / "p.parquet")
    for suffix in ("txt", "jsonl", "parquet"):
        assert [r.text for r in prompts.load(str(tmp_path / f"p.{suffix}"))] == texts
    assert prompts.load(str(tmp_path / "p.jsonl"))[0].extra == {"skill": "x"}
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="entry 1: no text under 'prompt'"):
        prompts.load(str(tmp_path / "bad.jsonl"))


def test_an_epoch_holds_every_prompt_once_and_position_is_the_step() -> None:
    seen = [i for step in range(10) for i in prompts.ids_of_step(25, 5, step, seed=1)]
    assert sorted(seen[:25]) == sorted(seen[25:]) == list(range(25))
    assert seen[:25] != seen[25:]
    assert prompts.ids_of_step(25, 5, 7, seed=1) == seen[35:40]
    larger = prompts.ids_of_step(3, 7, 0, seed=3)  # more prompts a step than the file holds
    assert sorted(larger[:3]) == sorted(larger[3:6]) == [0, 1, 2] and len(larger) == 7


def test_items_split_the_batch_and_depend_on_nothing_but_the_key(tmp_path: Path) -> None:
    config = small_config(tmp_path, "flowbp_bridge", "data.images_per_prompt=2", "method.draws=per_sample")
    sigmas = backbone_named("shapes").sigmas(6, 64, 64)

    def make(step: int) -> list:
        shape = config.data.shape
        return items_of_step(config.surrogate(), sigmas, shape, 100, 42, step, 1.0, Version(0, step), 114)

    items = make(3)
    assert [item.samples for item in items] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert [len(set(item.prompt_ids)) for item in items] == [1, 1, 1, 1]
    assert items == make(3) and items != make(4)
    assert len({plan for item in items for plan in item.plans}) > 1


def test_guidance_is_the_formula_and_a_detached_negative_has_no_gradient() -> None:
    """v_neg + g (v_cond - v_neg) by two separate forwards; the trained form has its gradient with v_neg detached."""
    backbone = backbone_named("shapes")
    transformer = backbone.load_transformer(torch.float32)
    table = encode(small_config(Path("runs")), ["a red circle", "two blue squares"])
    cond, negative, sigmas = table.rows([0, 1]), table.negative(2), backbone.sigmas(6, 64, 64)
    x, node, row = torch.randn(2, 8, 8, 8), torch.tensor([1, 4]), torch.tensor([0, 1])
    one, two = (backbone.predict(transformer, x, sigmas[node], c) for c in (cond, negative))
    want = two + 3.0 * (one - two)
    got = full_velocity(backbone, transformer, sigmas, cond, negative, 3.0)(x, node, row)
    assert torch.allclose(got, want, atol=1e-5)
    u = torch.randn_like(x)
    parameter = transformer.proj_out.weight
    wanted = torch.autograd.grad(((two.detach() + 3.0 * (one - two.detach())) * u).sum(), parameter)[0]
    v = trained_velocity(backbone, transformer, sigmas, cond, negative, 3.0, detach_negative=True)(x, node, row)
    assert torch.allclose(torch.autograd.grad((v * u).sum(), parameter)[0], wanted, rtol=1e-4, atol=1e-5)


def test_lora_publishes_adapters_only_and_a_sampler_takes_them() -> None:
    lora = LoraConfig(rank=2, alpha=4)
    learner, sampler = (backbone_named("shapes").load_transformer(torch.float32) for _ in range(2))
    trainable.prepare(learner, lora, seed=1)
    trainable.prepare(sampler, lora, seed=2)
    names = set(trainable.trained(learner))
    assert names and all("lora_" in name for name in names)
    with torch.no_grad():
        for parameter in trainable.trained(learner).values():
            parameter.normal_()
    assert digest(trainable.trained(learner)) != digest(trainable.trained(sampler))
    trainable.install(sampler, {k: v.detach() for k, v in trainable.trained(learner).items()})
    assert digest(dict(learner.state_dict())) == digest(dict(sampler.state_dict()))
    with pytest.raises(ValueError, match="do not fit"):
        trainable.install(sampler, {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="match no module"):
        trainable.prepare(backbone_named("shapes").load_transformer(torch.float32), LoraConfig(targets=["nope"]), 0)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, alpha=8), LoraConfig(rank=2, targets=["ff.net.2"])])
def test_what_is_trained_is_told_from_the_skeleton_as_from_the_weights(lora: LoraConfig | None) -> None:
    backbone = backbone_named("shapes")
    real = trainable.prepare(backbone.load_transformer(torch.float32), lora, 1, backbone.lora_targets)
    told = trainable.describe(trainable.prepare(backbone.skeleton(), lora, 1, backbone.lora_targets), lora)
    assert told == trainable.describe(real, lora)
    assert f"{sum(p.numel() for p in trainable.trained(real).values()):,} parameters" in told
    if lora is not None:
        modules = {name.rsplit(".lora_", 1)[0] for name in trainable.trained(real)}
        assert f"on {len(modules)} modules" in told and all(t in told for t in lora.targets or backbone.lora_targets)


def test_hosts_of_a_role_in_one_line() -> None:
    assert counted(["b", "a", "b"]) == "b (2), a" and counted(["a"]) == "a"
