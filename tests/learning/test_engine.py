"""Engines, averages, schedules, fingerprints, checkpoints: each against something independent, without Ray."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowbp_ray.config.learners import EmaConfig, LearnersConfig, OptimizerConfig, ScheduleConfig
from flowbp_ray.evaluation.estimates import measure
from flowbp_ray.evaluation.evaluator import Evaluator
from flowbp_ray.learning.deepspeed import interface_to
from flowbp_ray.learning.engine import TorchEngine
from flowbp_ray.learning.optim import Ema, lr_factor
from flowbp_ray.messages import Fault
from flowbp_ray.observability.tracker import Tracker
from flowbp_ray.prompts import PromptRecord
from flowbp_ray.run.checkpoint import Checkpoints, Snapshot
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.checksums import combine
from flowbp_ray.utils.errors import ConfigError
from flowbp_ray.utils.memory_meter import LiveBytes
from flowbp_ray.weights.fingerprint import fingerprint
from tests.learning.merging import merged, updates
from tests.small import small_config


def learners(**changes: object) -> LearnersConfig:
    return LearnersConfig.model_validate({"micro_batch": 1, "engine": "torch", **changes})


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3)).to(dtype)


def push(engine: TorchEngine, seed: int, factor: float = 1.0) -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)).to(next(engine.module.parameters()).dtype)
    engine.backward((engine.module(x).float() * factor).square().sum(), True)


def test_the_average_has_its_closed_form() -> None:
    """After n updates: d^n·w0 + (1−d)·Σ d^(n−i)·w_i."""
    shards = [torch.full((3,), 2.0), torch.full((2, 2), -1.0)]
    ema, path = Ema(shards, EmaConfig(decay=0.8)), [[s.clone() for s in shards]]
    for step in range(4):
        for shard in shards:
            shard.add_(step + 1.0)
        ema.update(shards)
        path.append([s.clone() for s in shards])
    for i, average in enumerate(ema.average):
        want = 0.8**4 * path[0][i] + 0.2 * sum(0.8 ** (4 - n) * path[n][i] for n in range(1, 5))
        torch.testing.assert_close(average, want)
    kept = [a.clone() for a in ema.average]
    with ema.swapped(shards):
        assert all(torch.equal(s, k) for s, k in zip(shards, kept, strict=True))
    assert all(torch.equal(s, p) for s, p in zip(shards, path[-1], strict=True))


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_schedules_are_those_of_torch(name: str) -> None:
    """Against torch.optim.lr_scheduler over the true number of steps."""
    warmup, steps, end = 4, 15, 0.1
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    left = steps - 1 - warmup
    scheduler = torch.optim.lr_scheduler
    after: dict[str, torch.optim.lr_scheduler.LRScheduler] = {
        "constant": scheduler.ConstantLR(optimizer, 1.0),
        "linear": scheduler.LinearLR(optimizer, 1.0, end, left),
        "cosine": scheduler.CosineAnnealingLR(optimizer, left, eta_min=end),
    }
    schedule = ScheduleConfig.model_validate({"name": name, "warmup": warmup, "end": end})
    found = [lr_factor(schedule, step, steps) for step in range(steps)]
    assert found[:warmup] == [(step + 1) / warmup for step in range(warmup)]
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    want = []
    for _ in range(warmup, steps):
        want.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        after[name].step()
    assert found[warmup:] == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_torch_engine_is_adamw_on_fp32_masters(dtype: torch.dtype) -> None:
    """Against torch's AdamW and clipping by hand, on fp32 copies where the module is bf16."""
    engine = TorchEngine(network(dtype), learners(optimizer={"lr": 1e-2, "max_grad_norm": 0.5}))
    twin = network(dtype)
    masters = [nn.Parameter(p.detach().float().clone()) for p in twin.parameters()]
    adam = torch.optim.AdamW(masters, lr=1e-2, weight_decay=1e-4)
    for step in range(3):
        push(engine, step)
        norm = engine.step(1e-2)
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(dtype)
        twin(x).float().square().sum().backward()
        for master, p in zip(masters, twin.parameters(), strict=True):
            assert p.grad is not None
            master.grad, p.grad = p.grad.float(), None
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(masters, 0.5)))
        adam.step()
        with torch.no_grad():
            for master, p in zip(masters, twin.parameters(), strict=True):
                p.copy_(master)
    for p, q in zip(engine.module.parameters(), twin.parameters(), strict=True):
        assert p.dtype == dtype and torch.equal(p, q)
    assert combine([engine.checksums()]) == fingerprint(engine.weights())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_gradient_exists_twice(dtype: torch.dtype) -> None:
    """In a step there are fp32 gradients, one tensor's in bf16 beside them, and AdamW's own of one or two tensors."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(16))).to(dtype)
    engine, count = TorchEngine(module, learners()), 16 * 64 * 64

    def gradients() -> list[Tensor]:
        for p in module.parameters():
            p.grad = torch.full_like(p, 0.1)
        return [p.grad for p in module.parameters() if p.grad is not None]

    gradients()
    engine.step(1e-3)  # which makes the moments
    moments = [t for state in engine.optimizer.state.values() for t in state.values()]
    meter = LiveBytes(counted=gradients(), ignored=[*module.parameters(), *engine.masters.values(), *moments])
    assert 4 * count <= meter.measure(lambda: engine.step(1e-3)) <= 5 * count
    assert all(p.grad is None for p in (*engine.named.values(), *engine.masters.values()))


def test_moments_in_int8_train_and_go_on_bit_for_bit(tmp_path: Path) -> None:
    """Two bytes and a scale per 256 parameters; near fp32 AdamW after 20 steps; a loaded engine is the same one.

    An engine with fp32 moments loads code · scale, as bitsandbytes defines them.
    """
    pytest.importorskip("bitsandbytes")

    def build(moments: str) -> TorchEngine:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 1024), nn.GELU(), nn.Linear(1024, 8))
        return TorchEngine(net, learners(optimizer={"lr": 1e-3, "moments": moments, "weight_decay": 0.1}))

    exact, small = build("fp32"), build("int8")
    start = {name: p.detach().clone() for name, p in exact.named.items()}
    for seed in range(20):
        for engine in (exact, small):
            push(engine, seed)
            engine.step(1e-3)
    for name, p in exact.named.items():
        moved, apart = (p - start[name]).norm(), (p - small.named[name]).norm()
        assert moved > 0 and apart < 0.1 * moved, name
    large = small.optimizer.state[small.named["2.weight"]]
    tensors = [t for key, t in large.items() if isinstance(t, Tensor) and not key.startswith("qmap")]
    assert sum(t.nbytes for t in tensors) == 2 * 8192 + 2 * 8192 // 256 * 4
    small.save(tmp_path)
    again = build("int8")
    again.load(tmp_path)
    plain = build("fp32")
    plain.load(tmp_path)
    quantised = {name: small.optimizer.state[p] for name, p in small.named.items()}
    for name, p in plain.named.items():
        for number, kind in enumerate(("exp_avg", "exp_avg_sq"), 1):
            codes, got = quantised[name][f"state{number}"], plain.optimizer.state[p][kind]
            if codes.dtype == torch.uint8:
                scales = quantised[name][f"absmax{number}"].repeat_interleave(256)
                codes = (quantised[name][f"qmap{number}"][codes.view(-1).long()] * scales).view(p.shape)
            assert got.dtype == torch.float32 and torch.equal(got, codes)
    for engine in (small, again):
        push(engine, 50)
        engine.step(1e-3)
    assert fingerprint(small.weights()) == fingerprint(again.weights())
    plain.save(tmp_path / "fp32")
    with pytest.raises(ConfigError, match=r"moments in fp32; write learners.optimizer.moments=fp32"):
        again.load(tmp_path / "fp32")


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    engine = TorchEngine(network(), learners(ema=EmaConfig(decay=0.5)))
    push(engine, 0)
    engine.step(1e-2)
    engine.save(tmp_path / "before")
    push(engine, 1, factor=1e30)
    assert not math.isfinite(engine.step(1e-2))
    engine.save(tmp_path / "after")
    before, after = merged(tmp_path / "before"), merged(tmp_path / "after")
    assert before.keys() == after.keys() and updates(tmp_path / "before") == updates(tmp_path / "after") == {1}
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_loaded_engine_goes_on_bit_for_bit(tmp_path: Path) -> None:
    config = learners(ema={"decay": 0.9}, optimizer={"lr": 1e-2})
    first = TorchEngine(network(torch.bfloat16), config)
    for seed in range(2):
        push(first, seed)
        first.step(1e-2)
    first.save(tmp_path)
    second = TorchEngine(network(torch.bfloat16), config)
    second.load(tmp_path)
    for engine in (first, second):
        push(engine, 5)
        engine.step(1e-2)
    for ema in (False, True):
        assert fingerprint(first.weights(ema)) == fingerprint(second.weights(ema))


def test_a_torn_checkpoint_is_never_found(tmp_path: Path) -> None:
    checkpoints, tensors = Checkpoints(tmp_path), {"w": torch.arange(3.0)}
    for step in (2, 4, 6):
        folder = checkpoints.begin(step)
        (folder / "engine.pt").write_bytes(b"engine")
        assert checkpoints.steps() == [s for s in (2, 4) if s < step][-2:]
        checkpoints.finish(Snapshot(step, tensors, {step - 1: tensors}, {"a|b": np.arange(2)}), keep=2)
    (checkpoints.begin(8) / "weights.safetensors").write_bytes(b"torn")
    assert checkpoints.steps() == [4, 6] and checkpoints.weights()[0] == 6
    assert list(checkpoints.versions(6)) == [5] and (checkpoints.path(6) / "engine.pt").is_file()
    assert checkpoints.evaluations(6)["a|b"].tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"no checkpoint of step 8 .* there are: \[4, 6\]"):
        checkpoints.weights(8)


def test_the_log_goes_back_to_a_checkpoint_without_gap_or_double(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, small_config(tmp_path))
    for step in range(4):
        if step % 2 == 0:
            tracker.log(step, "evaluation", {"verifier": 0.5})
        tracker.log(step, "train", {"loss": float(step)})
    tracker.file.write('{"step": 4, "ki')  # a line that a kill tore
    tracker.rewind(2)
    tracker.log(2, "train", {"loss": 9.0})
    tracker.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("evaluation", 0), ("train", 0), ("train", 1), ("evaluation", 2), ("train", 2),
    ]  # fmt: skip
    assert lines[-1]["loss"] == 9.0


def test_going_back_in_a_long_log_takes_no_memory(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, small_config(tmp_path))
    for step in range(2000):
        tracker.log(step, "train", {"text": "x" * 4000})
    tracemalloc.start()
    try:
        tracker.rewind(1500)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        tracker.close()
    assert peak < 1e6 < (tmp_path / "metrics.jsonl").stat().st_size
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1500


def test_evaluations_survive_a_checkpoint(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    records = [PromptRecord("a cat", {"skill": "x"}), PromptRecord("a dog", {"skill": "y"})]
    first = Evaluator(config, Run(tmp_path), records, 0)
    images, drawn = np.zeros((2, 8, 8, 3), np.uint8), np.ones(2, bool)
    first.results = {
        0: {1.0: measure(images, records, {"r": [0.1, 0.2]}, drawn)},
        60: {1.0: measure(images, records, {"r": [1, 2]}, drawn)},
    }
    first.first_pictures = {1.0: images}
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.begin(60)
    checkpoints.finish(Snapshot(60, {"w": torch.zeros(1)}, {}, first.state()), keep=1)
    second = Evaluator(config, Run(tmp_path), records, 0)
    second.load(checkpoints.evaluations(60))
    assert {s: {g: e.as_dict() for g, e in r.items()} for s, r in second.results.items()} == {
        s: {g: e.as_dict() for g, e in r.items()} for s, r in first.results.items()
    }
    assert np.array_equal(second.first_pictures[1.0], images)


def test_a_fault_names_what_is_known() -> None:
    fault = Fault("velocity", 7, 3, 1, node=4)
    assert fault.describe(["a", "a cat"]) == "velocity at node 4 is not finite: step 7, sample 3, prompt 'a cat'"
    assert "score of hps is" in Fault("score", 0, 0, 0, reward="hps").describe(["a"])
    assert OptimizerConfig().schedule.name == "constant"


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.1.1"])
def test_the_interface_to_an_address_of_this_host(address: str) -> None:
    assert interface_to(address) in ("lo", "lo0")
