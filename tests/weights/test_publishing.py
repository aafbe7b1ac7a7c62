"""Weights in buckets: what is divided, packed, gathered and loaded is bit for bit what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from actors import learner_group
from actors.learner_group import LearnerGroup
from actors.transport import load, restore
from flowbp_ray.config.learners import EmaConfig, LearnersConfig
from flowbp_ray.learning.engine import TorchEngine
from flowbp_ray.learning.optim import Ema
from flowbp_ray.local import LocalLoop
from flowbp_ray.messages import Version
from flowbp_ray.utils.digest import digest, digest_of_parts
from flowbp_ray.weights import buckets
from flowbp_ray.weights.buckets import Bucket, allocate_contiguous, assign_buckets, make_contiguous
from flowbp_ray.weights.fingerprint import fingerprint
from flowbp_ray.weights.packing import PackedTensors, Packer, Receiver, merge_tensors
from flowbp_ray.weights.trainable import trained
from tests.driver.faulty import SMALL, CountingLearner, instead
from tests.small import small_config


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 5), st.integers(1, 60))
def test_every_tensor_is_in_one_bucket_and_every_rank_has_its_share(sizes: list[int], ranks: int, limit: int) -> None:
    nbytes = {f"w{i}": size for i, size in enumerate(sizes)}
    found = assign_buckets(nbytes, ranks, limit)
    assert [name for bucket in found for name in bucket.names] == list(nbytes)
    assert {bucket.rank for bucket in found} == set(range(ranks))
    held = {rank: sum(nbytes[n] for b in found if b.rank == rank for n in b.names) for rank in range(ranks)}
    for bucket in found:
        assert sum(nbytes[name] for name in bucket.names) <= limit or len(bucket.names) == 1
    assert max(held.values()) - min(held.values()) <= max([*sizes, min(limit, -(-sum(sizes) // ranks))])


def test_a_bucket_is_512_mib_unless_a_tensor_has_more() -> None:
    sizes = {"a": 200 * 2**20, "b": 312 * 2**20, "c": 600 * 2**20, "d": 1, "e": 2**20}
    assert [bucket.names for bucket in assign_buckets(sizes)] == [("a", "b"), ("c",), ("d", "e")]
    assert assign_buckets({"a": 1}, 2) == [Bucket(("a",), 0), Bucket((), 1)]


def odd_tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    _, lying = allocate_contiguous(
        {"x": (torch.Size([3, 5]), torch.bfloat16), "y": (torch.Size([7]), torch.float32)}, "cpu"
    )
    for tensor in lying.values():
        tensor.copy_(torch.randn(tensor.shape, generator=g))
    lone = {"zero": torch.tensor(-0.0), "none": torch.empty(0, 3), "steps": torch.arange(6).view(2, 3)}
    return {**lying, **lone, "turned": torch.randn(4, 6, generator=g).t(), "last": torch.randn(2, 2).bfloat16()}


def test_a_parcel_holds_tensors_of_any_kind() -> None:
    tensors = odd_tensors()
    bucket = PackedTensors.of(tensors)
    back = bucket.tensors()
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
    assert fingerprint(back) == fingerprint(tensors) and digest(back) == digest(tensors)
    assert torch.signbit(back["zero"]) and PackedTensors.of({}).tensors() == {}


def test_a_packer_sees_that_tensors_have_moved() -> None:
    packer, tensors = Packer(), {k: t for k, t in odd_tensors().items() if k != "turned"}
    first = packer.pack(tensors)
    tensors["x"].add_(1)
    second = packer.pack(tensors)
    assert second.places is first.places and fingerprint(second.tensors()) == fingerprint(tensors)
    for moved in ({**tensors, "y": tensors["y"] + 1}, {k: t.clone() for k, t in tensors.items()}, odd_tensors()):
        again = packer.pack(moved)
        assert again.places is not first.places and fingerprint(again.tensors()) == fingerprint(moved)
    whole = torch.arange(32.0)
    halves = {"a": whole[:16], "b": whole[16:]}
    assert len(packer.pack(halves).arrays) == 1
    halves["b"].set_(halves["b"].clone().untyped_storage())  # type: ignore[call-overload]
    assert fingerprint(packer.pack(halves).tensors()) == fingerprint(halves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_engine_publishes_from_the_memory_of_its_weights(dtype: torch.dtype, monkeypatch: Any) -> None:
    """One array per bucket, no copy; the optimizer goes on in the same memory."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    config = LearnersConfig.model_validate({"micro_batch": 1, "engine": "torch", "ema": {"decay": 0.5}})
    engine = TorchEngine(module, config)
    assert fingerprint(engine.weights()) == fingerprint(before)
    held = assign_buckets(engine.sizes())
    [bucket] = [PackedTensors.of(tensors) for tensors in engine.parts(held)]
    assert len(bucket.arrays) == 1
    engine.backward(module(torch.ones(2, 5, dtype=dtype)).float().square().sum(), True)
    engine.step(1e-2)
    assert fingerprint(bucket.tensors()) == fingerprint(engine.weights()) != fingerprint(before)
    monkeypatch.setattr(buckets, "BUCKET", 40 * dtype.itemsize)
    several = assign_buckets(dict(sorted(engine.sizes().items())), 3)
    assert len(several) > 2
    for ema in (False, True):
        parts = [{k: v.clone() for k, v in tensors.items()} for tensors in engine.parts(several, ema)]
        assert digest_of_parts(parts) == digest(engine.weights(ema))


def test_a_receiver_copies_what_arrives_however_it_lies() -> None:
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3).bfloat16(), nn.Linear(3, 2)) for _ in range(4)]
    for module in modules:
        module[2].requires_grad_(False)
    receiver, frozen = Receiver(modules[0]), modules[0][2].weight.data_ptr()
    laid = trained(modules[1])
    make_contiguous(laid)
    apart = [trained(modules[2]), trained(modules[3])]
    versions = [
        [PackedTensors.of(laid)],
        [PackedTensors.of(apart[0])],
        [PackedTensors.of({k: t}) for k, t in reversed(apart[1].items())],
    ]
    for want, packed in zip((laid, *apart), versions, strict=True):
        receiver.install(packed)
        assert fingerprint(trained(modules[0])) == fingerprint(want)
        assert receiver.nbytes == 4 * (35 + 7) + 2 * (21 + 3)
    where = [p.data_ptr() for p in trained(modules[0]).values()]
    with torch.no_grad():
        for p in apart[1].values():
            p.add_(1)
    receiver.install([PackedTensors.of({k: t}) for k, t in reversed(apart[1].items())])
    assert fingerprint(trained(modules[0])) == fingerprint(apart[1])
    assert [p.data_ptr() for p in trained(modules[0]).values()] == where and modules[0][2].weight.data_ptr() == frozen
    for wrong, said in (
        ({"0.bias": laid["0.bias"]}, "1 for 4 parameters"),
        ({**laid, "0.bias": torch.zeros(8)}, r"0.bias is torch.float32 \(8,\) and not torch.float32 \(7,\)"),
        ({**laid, "1.bias": torch.zeros(3)}, "1.bias is torch.float32 "),
    ):
        with pytest.raises(ValueError, match=said):
            receiver.install([PackedTensors.of(wrong)])
    receiver.install(versions[0])
    assert fingerprint(trained(modules[0])) == fingerprint(laid)


def test_laying_out_leaves_other_strides_alone() -> None:
    turned = nn.Parameter(torch.randn(4, 6).t())
    dense = {"a": nn.Parameter(torch.randn(3)), "b": turned, "c": nn.Parameter(torch.randn(5))}
    values = {name: p.detach().clone() for name, p in dense.items()}
    make_contiguous(dense)
    assert turned.stride() == (1, 6) and fingerprint(dense) == fingerprint(values)
    assert dense["c"].data_ptr() - dense["a"].data_ptr() == buckets.ALIGNED


def test_the_average_is_swapped_in_pieces(monkeypatch: Any) -> None:
    monkeypatch.setattr("flowbp_ray.learning.optim.PIECE", 3)
    shards = [torch.arange(7.0), torch.tensor(1.0), torch.arange(6.0).view(2, 3)]
    ema = Ema(shards, EmaConfig(decay=0.5))
    for shard in shards:
        shard.add_(1)
    with ema.swapped(shards):
        assert [s.sum() for s in shards] == [21, 1, 15] and [a.sum() for a in ema.average] == [28, 2, 21]
    assert [s.sum() for s in shards] == [28, 2, 21]


CASES = [(3, "float32"), (1, "float32"), (2, "bfloat16"), (3, "bfloat16"), (0, "float32"), (1, "bfloat16")]


@pytest.mark.ray
@pytest.mark.deepspeed
@pytest.mark.parametrize(
    "zero, dtype", [pytest.param(*c, marks=[pytest.mark.long] if c in CASES[1:] else []) for c in CASES]
)
def test_ranks_publish_their_share_and_never_more_than_a_bucket_is_whole(
    local_ray: Any, tmp_path: Path, zero: int, dtype: str
) -> None:
    """Both ranks at every stage, weights and average, against the model's own weights, bit for bit."""
    engine = ["learners.engine=deepspeed", "learners.count=2", f"learners.zero={zero}", "learners.ema.decay=0.9"]
    config = small_config(tmp_path, "flowbp_sparse", f"backbone.dtype={dtype}", *engine)
    plain = config.learners.model_copy(update={"engine": "torch", "count": 1})
    want = LocalLoop(config.model_copy(update={"learners": plain})).learner
    with instead(learner_group, "RemoteLearner", CountingLearner):
        group = LearnerGroup(config)
        try:
            local_ray.get(group.launch())
            for ema in (False, True):
                published = group.publish(Version(0, 0, ema))
                tensors = merge_tensors(load(published.weights))
                assert published.fingerprint == fingerprint(tensors) == fingerprint(want.engine.weights())  # type: ignore[attr-defined]
                assert min(group.buckets) >= 2 and len(published.weights) == sum(group.buckets)
                most = max(local_ray.get([rank.most_whole.remote() for rank in group.ranks]))
                assert most == 0 if zero < 3 or ema else 0 < most <= max(SMALL, *(t.nbytes for t in tensors.values()))
                assert not any(local_ray.get([rank.whole_bytes.remote() for rank in group.ranks]))
            assert group.digest() == want.digest()
            again = restore(Version(1, 0), {name: t.clone() for name, t in tensors.items()})
            assert again.fingerprint == fingerprint(merge_tensors(load(again.weights))) == published.fingerprint
        finally:
            group.stop()
