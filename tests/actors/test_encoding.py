"""The parts in which prompts are encoded: their sizes and order, what a run holds of them, and when it needs them."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

import actors.encoder_process
import actors.encoding
from actors.encoder import EncoderActor
from actors.encoder_process import has_room_beside
from actors.encoding import PART_BYTES, Encoding, next_size
from actors.learner_group import LearnerGroup
from actors.process import Roles
from flowbp_ray import driver, prompts
from flowbp_ray.backbones.embeddings import EMPTY, PackedEmbeddings, distinct_texts
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.driver import Loop
from flowbp_ray.messages import EncodedPart, Packed, ScoredItem
from flowbp_ray.utils.errors import RunFailed
from tests import clients
from tests.driver.chaos import before_step
from tests.driver.faulty import instead
from tests.small import local_digest, short_prompts, small_config


def test_each_distinct_text_once_in_the_order_of_need_with_all_its_ids() -> None:
    texts = ["a", "b", "a", "", "c", "d"]
    found = list(distinct_texts(texts, [4, 2, 3, 0]).items())
    assert found == [("", (EMPTY, 3)), ("c", (4,)), ("a", (2, 0))]


def test_a_part_grows_until_a_call_takes_long_or_gives_much() -> None:
    assert [next_size(n, 0.01, 1000 * n, 2.0) for n in (1, 2, 4, 64)] == [2, 4, 8, 128]
    assert next_size(1, 75.0, 1000, 2.0) == 1  # T5-XXL on one thread
    assert next_size(8, 4.0, 1000, 2.0) == 4 and next_size(8, 0.0, 0, 2.0) == 16
    assert next_size(1, 0.01, PART_BYTES + 1, 2.0) == 1 and next_size(4, 0.01, PART_BYTES // 2, 2.0) == 8
    assert next_size(8, 0.01, PART_BYTES, 2.0) == 8


def looked_at(loop: Loop, step: int) -> tuple[int, int, int, int]:
    """(texts encoded, bytes of them, bytes in parts that are held, prompts held) before a step, all being encoded."""
    encoding, config = loop.fleet.encoding, loop.config
    encoding.finish()
    assert encoding.encoded is not None and len(encoding.queue) == encoding.encoded.encoded
    left = {i for s in range(step, config.steps) for i in prompts.ids_of_step(loop.source.prompt_count, 4, s, 42)}
    assert sorted(encoding.parts) == sorted({"", *(encoding.texts[i] for i in left)})
    parts: list[PackedEmbeddings] = ray.get(list(dict.fromkeys(encoding.parts.values())))
    return encoding.encoded.encoded, encoding.encoded.nbytes, sum(part.nbytes for part in parts), len(encoding.parts)


@pytest.mark.ray
def test_a_run_on_107515_prompts_encodes_and_holds_what_one_on_64_does(local_ray: Any, tmp_path: Path) -> None:
    """Three steps of four prompts: 12 and the empty one, and after a checkpoint those of the steps that are left."""
    nbytes = 13 * 4 * (14 * 128 + 128)
    for count in (64, 107_515):
        settings = [f"data.prompts={short_prompts(tmp_path, count)}", "encoder.cache=null", f"name=of_{count}"]
        settings += ["steps=3", "checkpoint.every=1", "checkpoint.background=false"]  # what is left is known by then
        config = small_config(tmp_path, "flowbp_sparse", *settings)
        found: list[tuple[int, int, int, int]] = []
        look = partial(partial, lambda looks, step, loop: looks.append(looked_at(loop, step)), found)
        with before_step(0, look(0)), before_step(2, look(2)):
            _, summary = driver.train(config)
        assert summary["weights_sha256"] == local_digest(config)
        assert found[0] == (13, nbytes, nbytes, 13) and found[1][:2] == (13, nbytes) and found[1][3] == 5


class Held(EncoderActor):
    """Encodes a part without any prompt of the first step only once there is a file `go` in the run's output."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        texts = [record.text for record in prompts.load(config.data.prompts)]
        ids = prompts.ids_of_step(len(texts), config.data.prompts_per_step, 0, config.seed)
        self.first, self.go = {"", *(texts[i] for i in ids)}, Path(config.output) / "go"

    def add(self, texts: Sequence[str], ids: Sequence[tuple[int, ...]]) -> tuple[EncodedPart, PackedEmbeddings]:
        while self.first.isdisjoint(texts) and not self.go.exists():
            time.sleep(0.05)
        return super().add(texts, ids)


@pytest.mark.ray
def test_the_first_step_does_not_wait_for_the_prompts_of_the_last(local_ray: Any, tmp_path: Path) -> None:
    config = small_config(tmp_path, "flowbp_sparse", "steps=4", "encoder.cache=null", "staleness=1")
    at: list[int] = []

    def let_go(loop: Loop) -> None:
        at.append(loop.fleet.encoding.done)
        (tmp_path / "go").touch()

    with instead(actors.encoder_process, "RemoteEncoder", Held), before_step(1, let_go):
        run, _ = driver.train(config)
    drawn = len(prompts.drawn(config, len(prompts.load(config.data.prompts)), 0))
    assert 1 + 4 <= at[0] < 1 + drawn
    log = (run.folder / "log.txt").read_text()
    assert f"embeddings: {1 + drawn} distinct prompts" in log
    assert "; the others follow in the course of the run" in log


class Stuck:
    """Never answers."""

    def __init__(self, config: RunConfig) -> None:
        pass

    def add(self, texts: Sequence[str], ids: Sequence[tuple[int, ...]]) -> None:
        time.sleep(3600)


def test_a_gpu_encodes_beside_training_only_where_all_have_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Three samplers at most with half a GPU each are two, and a learner, a reward server and the encoder are five."""
    gpus = ["samplers.gpus=0.5", "samplers.max=3", "learners.gpus=1", "rewards.gpus=1", "encoder.gpus=1"]
    config = small_config(tmp_path, "refl", *gpus)
    for there, beside in ((5.0, True), (4.0, False)):
        monkeypatch.setattr(ray, "available_resources", lambda there=there: {"GPU": there})
        assert has_room_beside(config) is beside
        assert has_room_beside(small_config(tmp_path, "refl", *gpus, "encoder.gpus=0"))


@pytest.mark.ray
def test_an_encoder_that_does_not_answer_ends_the_run(local_ray: Any, tmp_path: Path) -> None:
    config = small_config(tmp_path, "flowbp_sparse", "cluster.stall_timeout=1", "cluster.placement_timeout=60")
    encoding = Encoding(config, ["a red circle"], prompts.Needs(config, 1), Roles(encoder=ray.remote(Stuck)))
    try:
        with pytest.raises(RunFailed, match="the encoder did not answer within 1 s"):
            encoding.finish()
    finally:
        encoding.end()


class Nodes:
    """One node at a time that joins the private Ray, with room for the encoder only."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        room = ["--num-cpus=0", "--num-gpus=0", '--resources={"encoding": 1}', "--object-store-memory=100000000"]
        address = f"--address={ray.get_runtime_context().gcs_address}"
        command = [clients.BIN / "ray", "start", "--block", "--disable-usage-stats", address, *room]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not ray.cluster_resources().get("encoding"):
            assert self.process.poll() is None
            time.sleep(0.1)

    def end(self) -> None:
        if self.process is not None:
            children = psutil.Process(self.process.pid).children(recursive=True)
            for child in children:  # the raylet with its workers; `ray start` itself would drain it for 30 s
                if child.name() == "raylet":
                    child.terminate()
            psutil.wait_procs(children, timeout=10)
            self.process.kill()
            self.process.wait()

    def replace(self) -> None:
        """End the node with all that it holds, and start another one."""
        self.end()
        while ray.cluster_resources().get("encoding"):
            time.sleep(0.1)
        self.start()


@pytest.fixture
def nodes(local_ray: Any) -> Iterator[Nodes]:
    made = Nodes()
    made.start()
    try:
        yield made
    finally:
        made.end()


class Large(EncoderActor):
    """Adds to each part a prompt that nobody asks for, with so many bytes that Ray does not keep the part inline."""

    def add(self, texts: Sequence[str], ids: Sequence[tuple[int, ...]]) -> tuple[EncodedPart, PackedEmbeddings]:
        report, part = super().add(texts, ids)
        more = {"none": Packed(np.zeros(2**20, np.uint8), "uint8")}
        return report, PackedEmbeddings((*part.ids, (-2,)), (*part.tensors, more))


@pytest.mark.ray
@pytest.mark.parametrize(
    ("cache", "beside"),
    [(True, False), *(pytest.param(*p, marks=pytest.mark.long) for p in ((False, True), (True, True), (False, False)))],
)
def test_a_window_of_steps_is_held_and_the_bits_are_the_same(
    local_ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: bool, beside: bool
) -> None:
    """Two epochs of twelve prompts in six steps. Without a cache a second epoch must not encode again."""
    kept = f"encoder.cache={tmp_path / 'cache' if cache else 'null'}"
    file = f"data.prompts={short_prompts(tmp_path, 12)}"
    config = small_config(tmp_path, "flowbp_sparse", "steps=6", "encoder.ahead=1", kept, file)
    monkeypatch.setattr(actors.encoding, "has_room_beside", lambda config: beside)
    monkeypatch.setattr(actors.encoding, "CALL_SECONDS", 1e-6)  # a prompt a call
    held: list[set[str]] = []
    texts = [record.text for record in prompts.load(config.data.prompts)]

    def look(loop: Loop) -> None:
        encoding = loop.fleet.encoding
        encoding.finish()
        held.append(set(encoding.parts) - {""})
        assert encoding.encoded is not None and encoding.encoded.encoded == 13
        assert encoding.process.reads == cache and (encoding.process.actor is None) == (not cache)

    with before_step(4, look):
        _, summary = driver.train(config)
    assert summary["weights_sha256"] == local_digest(config)
    window = {texts[i] for step in (3, 4) for i in prompts.ids_of_step(12, 4, step, 42)}  # step 3 is the last collected
    assert held == [window] if cache else [set(texts)]


@pytest.mark.ray
@pytest.mark.long
def test_the_end_of_the_encoders_node_changes_no_bit(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before step 1 the node dies with the encoder and the parts of that step.

    Before the learner gets the parts of step 2, they have been encoded again and are lost again.
    """
    at = ["encoder.cpus=0", "encoder.resources={encoding: 1}", "encoder.ahead=0", "encoder.cache=null"]
    config = small_config(tmp_path, "flowbp_sparse", "steps=4", f"data.prompts={short_prompts(tmp_path, 64)}", *at)
    encodings: list[Encoding] = []
    original, steps = LearnerGroup.step, list[int]()

    def lose(loop: Loop) -> None:
        encodings.append(loop.fleet.encoding)
        encodings[0].advance(1)
        encodings[0].finish()
        nodes.replace()

    def step(self: LearnerGroup, number: int, items: Sequence[ScoredItem], *rest: Any) -> Any:
        steps.append(number)
        if number == 2 and steps.count(2) == 1:
            encodings[0].lost(encodings[0].parts.values())
            encodings[0].await_refs([i for scored in items for i in scored.item.prompt_ids])
            nodes.replace()
        return original(self, number, items, *rest)

    monkeypatch.setattr(LearnerGroup, "step", step)
    with instead(actors.encoder_process, "RemoteEncoder", Large), before_step(1, lose):
        run, summary = driver.train(config)
    assert summary["weights_sha256"] == local_digest(config)
    log = (run.folder / "log.txt").read_text()
    assert "the encoder is built again" in log and "are lost, and encoded again" in log
    assert steps == [0, 1, 2, 0, 1, 2, 3] and "building the learners again" in log
