"""Broadcasts over gloo: what arrives is bit for bit what was sent, whoever dies, comes or goes meanwhile."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from flowbp_ray.messages import Version
from flowbp_ray.weights import broadcast, buckets
from flowbp_ray.weights.broadcast import Sender, lying
from flowbp_ray.weights.buckets import Blocks, make_contiguous
from flowbp_ray.weights.fingerprint import fingerprint
from flowbp_ray.weights.group import Group
from flowbp_ray.weights.inbox import Inbox
from flowbp_ray.weights.packing import PackedTensors, Receiver
from flowbp_ray.weights.trainable import trained

HERE, SECONDS = "127.0.0.1", 8.0


def module(seed: int) -> nn.Module:
    """Four trained tensors of two dtypes in several buckets, and a frozen one."""
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3).bfloat16(), nn.Linear(3, 2))
    made[2].requires_grad_(False)
    return made


class Seated:
    """A sampler's module with its inbox."""

    def __init__(self, sender: Any, seat: str, spare: int = 0, patience: float = 5.0) -> None:
        self.module, self.busy, self.overwritten = module(99), threading.Lock(), 0
        self.receiver = Receiver(self.module)
        self.inbox = Inbox(
            self.receiver, HERE, sender.port, seat, self.busy, spare, self._overwritten, patience, seconds=SECONDS
        )

    def _overwritten(self) -> None:
        self.overwritten += 1

    @property
    def fingerprint(self) -> str:
        return fingerprint(trained(self.module))


@pytest.fixture(autouse=True)
def several_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "BUCKET", 70)


@pytest.fixture
def sender() -> Iterator[Sender]:
    made = Sender(HERE, blocks(), "cpu", patience=5.0, seconds=SECONDS)
    yield made
    made.close()


def blocks() -> Blocks:
    return Blocks.of({name: p.nbytes for name, p in trained(module(0)).items()})


def deliver(sender: Sender, seats: list[str], step: int, weights: nn.Module | None = None) -> tuple[str, Any]:
    """Broadcast version `step`, whose weights are those of module(step); return their fingerprint and the delivery."""
    own = trained(weights or module(step))
    sender.call(seats, (0, step, False))
    for bucket in sender.blocks.buckets:
        sender.send(sender.array(bucket, {name: own[name].detach() for name in bucket.names}))
    return fingerprint(own), sender.finish()


def test_samplers_come_and_go_and_each_has_the_bits(sender: Sender) -> None:
    assert len(sender.blocks.buckets) > 2
    crowd = {f"s{i}": Seated(sender, f"s{i}") for i in range(4)}
    for step, seats in enumerate((["s0"], ["s0", "s1", "s2", "s3"], ["s0", "s1", "s2", "s3"], ["s3", "s1"])):
        groups = sender.groups
        want, delivery = deliver(sender, seats, step)
        assert delivery.seats == tuple(seats) and not delivery.error
        assert sender.groups == groups + (step != 2)  # rebuilt only if the members changed
        for seat in seats:
            assert crowd[seat].inbox.install(Version(0, step)) and crowd[seat].fingerprint == want
            assert not crowd[seat].inbox.install(Version(0, step - 1))
    assert [seated.overwritten for seated in crowd.values()] == [3, 3, 2, 3]


def test_the_store_does_not_grow_with_the_broadcasts(sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "LATE", 2)
    crowd = [Seated(sender, seat) for seat in ("a", "b")]
    sizes = []
    for step in range(8):
        deliver(sender, ["a", "b"] if step % 4 < 2 else ["a"], step)
        sizes.append(sender.store.num_keys())
    assert len(crowd) == 2 and sizes[3] == sizes[7] and sizes[1] == sizes[5]


def test_weights_are_sent_from_their_memory_if_they_lie_right_and_from_a_copy_otherwise(sender: Sender) -> None:
    seated = Seated(sender, "s")
    laid = module(5)
    make_contiguous(trained(laid))
    apart = trained(module(5))
    for bucket in sender.blocks.buckets:
        whole = lying(bucket, {name: trained(laid)[name] for name in bucket.names}, sender.blocks)
        assert whole is not None and whole.data_ptr() == trained(laid)[bucket.names[0]].data_ptr()
        if len(bucket.names) > 1:
            assert lying(bucket, {name: apart[name] for name in bucket.names}, sender.blocks) is None
    for step, weights in ((1, laid), (2, module(5))):
        want, delivery = deliver(sender, ["s"], step, weights)
        assert delivery.seats == ("s",) and seated.inbox.install(Version(0, step)) and seated.fingerprint == want


def test_versions_that_are_still_needed_stay_beside_the_one_in_use(sender: Sender) -> None:
    seated = Seated(sender, "s", spare=2)
    wanted = {}
    with seated.busy:  # an item is in progress all the time
        for step in (1, 2, 3):
            before = seated.fingerprint
            wanted[step], delivery = deliver(sender, ["s"], step)
            assert delivery.seats == ("s",) and seated.fingerprint == before and not seated.overwritten
        assert not seated.inbox.install(Version(0, 1))  # the oldest made room
        for step in (2, 3):
            assert seated.inbox.install(Version(0, step)) and seated.fingerprint == wanted[step]
        wanted[4], _ = deliver(sender, ["s"], 4)
        assert seated.inbox.copies == 2 and seated.inbox.install(Version(0, 4))
    assert seated.fingerprint == wanted[4]


def test_what_came_otherwise_is_not_taken_for_what_was_broadcast(sender: Sender) -> None:
    """An average from the object store, whatever its layout, between a version's arrival and its use."""
    seated = Seated(sender, "s")
    deliver(sender, ["s"], 1)
    other = trained(module(7))
    seated.receiver.install([PackedTensors.of({name: p}) for name, p in other.items()])
    seated.inbox.forget()
    assert seated.fingerprint == fingerprint(other) and not seated.inbox.install(Version(0, 1))
    with pytest.raises(ValueError, match="published weights do not fit"):
        seated.receiver.install([PackedTensors.of({"0.bias": other["0.bias"]})])
    want, _ = deliver(sender, ["s"], 2)
    assert seated.inbox.install(Version(0, 2)) and seated.fingerprint == want


def test_a_sampler_without_memory_for_a_copy_says_so(sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    full, well = Seated(sender, "full", spare=1), Seated(sender, "well")

    def place(version: Version) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(full.inbox, "_place", place)
        _, delivery = deliver(sender, ["full", "well"], 1)
    assert "full" not in delivery.seats and delivery.error
    want, delivery = deliver(sender, ["full", "well"], 2)
    assert set(delivery.seats) == {"full", "well"}
    for seated in (full, well):
        assert seated.inbox.install(Version(0, 2)) and seated.fingerprint == want


def test_who_does_not_answer_is_left_out() -> None:
    """One never came, one is busy with an item, one has another model: the fourth gets the weights all the same."""
    sender = Sender(HERE, blocks(), "cpu", patience=2.0, seconds=SECONDS)
    well, busy, other = (Seated(sender, name, patience=1.5) for name in ("well", "busy", "other"))
    other.inbox.blocks = Blocks.of({"w": 4})
    with busy.busy:
        want, delivery = deliver(sender, ["well", "gone", "busy"], 1)
    assert delivery.seats == ("well",) and delivery.error == "gone: no answer"
    assert well.inbox.install(Version(0, 1)) and well.fingerprint == want
    _, delivery = deliver(sender, ["busy", "gone"], 2)
    assert delivery.seats == ("busy",)
    _, delivery = deliver(sender, ["gone"], 3)
    assert delivery.seats == () and delivery.error == "gone: no answer"
    _, delivery = deliver(sender, ["other"], 4)
    assert delivery.seats == () and delivery.error == "other: its weights have other names or sizes than the learners'"
    want, delivery = deliver(sender, ["busy", "well"], 5)
    assert set(delivery.seats) == {"busy", "well"} and busy.inbox.install(Version(0, 5)) and busy.fingerprint == want


def take_part_then_hang(port: int, broadcasts: int, said: Any) -> None:
    """In a process of its own: take part in so many broadcasts of an array, and hang in the next one."""
    original, left = Group.broadcast, [broadcasts]

    def broadcast(self: Group, array: torch.Tensor) -> None:
        if left[0] == 0:
            said.put("hangs")
            time.sleep(600)
        left[0] -= 1
        original(self, array)

    Group.broadcast = broadcast  # type: ignore[method-assign]
    _seated = Seated(SimpleNamespace(port=port), "dying")
    said.put("seated")
    time.sleep(600)


def test_a_sampler_that_dies_in_the_middle_costs_that_broadcast_only(sender: Sender) -> None:
    """It is killed between two buckets of the second version; the next version reaches the others."""
    sender.patience = 2.0
    first, count = Seated(sender, "first"), len(sender.blocks.buckets)
    fork = multiprocessing.get_context("fork")
    said = fork.Queue()
    process = fork.Process(target=take_part_then_hang, args=(sender.port, count + 1, said), daemon=True)
    process.start()
    try:
        assert said.get(timeout=60) == "seated"
        assert deliver(sender, ["first", "dying"], 1)[1].seats == ("first", "dying")
        killer = threading.Thread(target=lambda: (said.get(timeout=60), process.kill()))
        killer.start()
        _, delivery = deliver(sender, ["first", "dying"], 2)
        killer.join()
        assert "dying" not in delivery.seats and delivery.error
        want, delivery = deliver(sender, ["first", "dying"], 3)
        assert delivery.seats == ("first",)
        assert first.inbox.install(Version(0, 3)) and first.fingerprint == want
    finally:
        process.kill()
        process.join()


def test_an_inbox_ends_with_its_sender() -> None:
    sender = Sender(HERE, blocks(), "cpu", patience=5.0, seconds=SECONDS)
    seated = Seated(sender, "s")
    deliver(sender, ["s"], 1)
    sender.close()
    sender.store = None
    seated.inbox.thread.join(timeout=30)
    assert not seated.inbox.thread.is_alive() and seated.inbox.install(Version(0, 1))
