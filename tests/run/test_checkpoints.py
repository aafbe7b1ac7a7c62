"""Checkpoints that are damaged, torn, read by others or without room: what stays, what is said, what is taken."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowbp_ray.run.checkpoint import Checkpoints, Snapshot
from flowbp_ray.run.engine_state import Fragment, write_state
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.errors import ConfigError, NoSpace, RunFailed
from flowbp_ray.utils.tensor_file import check_room, write_bytes, write_tensors
from tests.chaos.disk import Disk, mountable
from tests.limits import files_of_at_most
from tests.small import small_config


def save(checkpoints: Checkpoints, step: int, keep: int = 9, wrong: bool = False) -> None:
    """The checkpoint of two ranks. wrong: one of them states another digest than that of its file."""
    folder, written = checkpoints.begin(step), dict[str, str]()
    for rank in (0, 1):
        own = Fragment("w", (6,), 3 * rank, 1, {"master": torch.full((3,), float(step))})
        written |= write_state(folder, [own], rank, 2, {})
    if wrong:
        written["engine/rank_0001.safetensors"] = "0" * 64
    weights, left = {"w": torch.full((6,), float(step))}, {"images|1|1.0": np.zeros((1, 2, 2, 3), np.uint8)}
    evaluations = {"a": np.full(2, step)}
    checkpoints.finish(Snapshot(step, weights, {}, evaluations, weights, left), keep, written=written)


def saved(folder: Path, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(folder)
    for step in steps:
        save(checkpoints, step)
    checkpoints.settle()
    return checkpoints


FILES = ["engine/rank_0000.json", "engine/rank_0000.safetensors", "engine/rank_0001.json", "average.safetensors",
         "engine/rank_0001.safetensors", "evaluations.npz", "manifest.json", "unjudged.npz",
         "weights.safetensors"]  # fmt: skip


def flip(path: Path, where: float) -> None:
    """Invert one bit."""
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("name", FILES)
def test_the_newest_that_is_whole_is_taken(tmp_path: Path, name: str) -> None:
    """A bit anywhere, the last byte, a whole file: the checkpoint is set aside under another name, in one line."""
    checkpoints = saved(tmp_path / "whole", 1, 2)
    files = sorted(str(p.relative_to(checkpoints.path(2))) for p in checkpoints.path(2).rglob("*") if p.is_file())
    assert sorted(FILES) == files and checkpoints.set_damaged_aside() == []
    harms = [lambda p: flip(p, 0.0), lambda p: flip(p, 0.6), lambda p: flip(p, 1.0), truncate, Path.unlink]
    for number, harm in enumerate(harms):
        copy = Checkpoints(Path(shutil.copytree(tmp_path / "whole", tmp_path / str(number))))
        harm(copy.path(2) / name)
        if name == "manifest.json" and copy.damages(2) == []:
            continue  # a bit of its white space
        [line] = copy.set_damaged_aside()
        assert line.startswith("the checkpoint of step 2 is damaged (") and "\n" not in line
        assert name == "manifest.json" or name in line
        assert copy.steps() == [1] and (copy.folder / "step_000002.damaged").is_dir()
        assert copy.weights()[1]["w"].tolist() == [1.0] * 6


def test_several_damaged_ones_are_set_aside_and_their_steps_are_saved_again(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2, 3)
    for step in (2, 3):
        truncate(checkpoints.path(step) / "weights.safetensors")
    first, second = checkpoints.set_damaged_aside()
    assert "step 3" in first and "step 2" in second and checkpoints.steps() == [1]
    save(checkpoints, 2)
    checkpoints.settle()
    truncate(checkpoints.path(2) / "weights.safetensors")
    assert checkpoints.set_damaged_aside()[0].endswith("set aside as step_000002.damaged-2")
    assert checkpoints.steps() == [1]


def test_weights_that_are_not_those_written_are_not_given_out(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    flip(checkpoints.path(1) / "weights.safetensors", 1.0)
    with pytest.raises(ConfigError, match=r"weights.safetensors is not what was written"):
        checkpoints.weights(1)
    assert checkpoints.weights(1, average=True)[1]["w"].tolist() == [1.0] * 6
    with pytest.raises(RunFailed, match=r"step 1 is damaged: weights.safetensors is not what was written"):
        checkpoints.sound(1)


def test_an_older_one_goes_once_the_newer_was_read_back(tmp_path: Path) -> None:
    """The disk gives back other bytes than a rank has written: nothing is removed, and the run stops."""
    checkpoints = saved(tmp_path, 1)
    save(checkpoints, 2, keep=1, wrong=True)
    with pytest.raises(RunFailed, match=r"step 2 is damaged \(engine/rank_0001.safetensors is not .* other bytes"):
        checkpoints.settle()
    assert checkpoints.steps() == [1] and checkpoints.damages(1) == []
    save(checkpoints, 2, keep=1)
    checkpoints.settle()
    assert checkpoints.steps() == [2]


def test_one_that_is_read_is_not_removed(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    with Checkpoints(tmp_path).reading(1):
        save(checkpoints, 2, keep=1)
        checkpoints.settle()
        assert checkpoints.steps() == [1, 2] and checkpoints.damages(1) == []
    save(checkpoints, 3, keep=1)
    checkpoints.settle()
    assert checkpoints.steps() == [3]


def test_without_room_nothing_is_touched(tmp_path: Path) -> None:
    """What is there is as large as what is free; a disk that becomes full; and a file that would not fit."""
    checkpoints = saved(tmp_path, 1)
    hole = checkpoints.path(1) / "hole"
    with hole.open("wb") as file:
        file.truncate(2 * shutil.disk_usage(tmp_path).free)  # which takes nothing
    with pytest.raises(NoSpace, match=r"the size of step_000001 takes .*iB, of which all but .*iB are free; make room"):
        checkpoints.begin(2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"] and checkpoints.damages(1) == []
    hole.unlink()
    with pytest.raises(NoSpace, match=r"weights takes .* TiB, of which all but .* are free"):
        check_room(tmp_path / "weights", 1 << 60)
    with pytest.raises(NoSpace, match="the disk became full while full was written"):
        write_bytes(Path("/dev/full"), b"some bytes")
    checkpoints.begin(2)
    checkpoints.abandon(2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


@pytest.mark.skipif(not mountable(), reason="mounts a disk of its own, as root")
def test_without_an_inode_nothing_is_touched(tmp_path: Path) -> None:
    """Bytes are free, but no further file is allowed: before a save, in that of a rank, and in the driver's."""
    with Disk(tmp_path / "disk") as disk:
        checkpoints = saved(disk.folder / "checkpoints", 1)
        checkpoints.settle()
        disk.fill_with_files()
        with pytest.raises(NoSpace, match=r"no inode left for another file \(`df -i`\); make room"):
            checkpoints.begin(2)
        disk.empty()
        folder = checkpoints.begin(2)
        disk.fill_with_files()
        with pytest.raises(NoSpace, match="the disk became full while engine was written"):
            write_state(folder, [], 0, 1, {})
        with pytest.raises(NoSpace, match="no inode left"):
            checkpoints.write(Snapshot(2, {"w": torch.zeros(6)}, {}, {})).result()
        checkpoints.abandon(2)
        assert [path.name for path in checkpoints.folder.iterdir()] == ["step_000001"]
        assert checkpoints.damages(1) == []


def test_a_limit_on_the_size_of_files_is_no_space(tmp_path: Path) -> None:
    with files_of_at_most(1 << 12), pytest.raises(NoSpace, match=r"`ulimit -f`, allowed no more while weights was"):
        write_tensors(tmp_path / "weights", {"w": torch.zeros(1 << 12)})


def test_a_kill_between_two_names_loses_neither(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    checkpoints.path(2).rename(checkpoints.path(2).with_suffix(".replaced"))
    shutil.copytree(checkpoints.path(1), checkpoints.path(2).with_suffix(".partial"))
    assert checkpoints.steps() == [1]
    assert checkpoints.set_damaged_aside() == [] and checkpoints.steps() == [1, 2]
    shutil.copytree(checkpoints.path(2), checkpoints.path(2).with_suffix(".replaced"))
    checkpoints.tidy()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000002"]
    save(checkpoints, 2)
    checkpoints.settle()
    assert checkpoints.steps() == [1, 2] and checkpoints.damages(2) == []


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_evaluations_are_replaced_with_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turn: int) -> None:
    """Killed at any of its three renames, the checkpoint is whole, with the old or the new evaluations."""
    checkpoints, replace, turns = saved(tmp_path, 1), os.replace, [0]

    def killed(old: Any, new: Any) -> None:
        turns[0] += 1
        if turns[0] > turn:
            raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.replace_evaluations(1, {"a": np.arange(9)})
    monkeypatch.undo()
    assert checkpoints.damages(1) == []
    assert checkpoints.evaluations(1)["a"].tolist() == ([1, 1] if turn < 2 else list(range(9)))
    checkpoints.replace_evaluations(1, {"a": np.arange(3)})
    assert checkpoints.damages(1) == [] and checkpoints.evaluations(1)["a"].tolist() == [0, 1, 2]


def test_other_versions_are_refused_in_one_line(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    manifest = checkpoints.path(2) / "manifest.json"
    found = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**found, "format": 2}))
    with pytest.raises(ConfigError, match=r"has format 2, this version reads 1; go on with the one that wrote it$"):
        checkpoints.set_damaged_aside()
    manifest.unlink()
    shutil.rmtree(checkpoints.path(2) / "engine")
    (checkpoints.path(2) / "engine.pt").touch()
    with pytest.raises(ConfigError, match=r"is of an earlier version, .* write another name= .*$"):
        checkpoints.set_damaged_aside()
    assert checkpoints.steps() == [1, 2] and checkpoints.weights()[1]["w"].tolist() == [2.0] * 6


def test_a_run_goes_on_with_other_learners_and_from_what_is_whole(tmp_path: Path) -> None:
    """Where and in which order the sums are made is free; what is summed is not."""
    run = Run.create(small_config(tmp_path, "flowbp_sparse", "name=mine"))
    elsewhere = ["learners.engine=deepspeed", "learners.count=2", "learners.zero=3", "learners.offload=true",
                 "learners.micro_batch=1", "learners.fuse=2", "learners.gradient_checkpointing=true"]  # fmt: skip
    for step in (1, 2):
        save(run.checkpoints, step)
    run.checkpoints.settle()
    truncate(run.checkpoints.path(2) / "engine" / "rank_0001.json")
    resumed = Run.resume(small_config(tmp_path, "flowbp_sparse", "name=mine", "resume=auto", *elsewhere))
    assert resumed.checkpoints.steps() == [1, 2] and not resumed.damaged  # nothing is touched before the lock is held
    with resumed.locked(print):
        [line] = resumed.damaged
        assert resumed.checkpoints.steps() == [1]
    assert "step 2 is damaged (engine/rank_0001.json is not what was written)" in line
    assert line in (run.folder / "log.txt").read_text()
    for other in ("learners.ema={decay: 0.5}", "learners.optimizer.moments=int8"):
        with pytest.raises(ConfigError, match="is a run of another configuration"):
            Run.resume(small_config(tmp_path, "flowbp_sparse", "name=mine", "resume=auto", other))
    whole = Run.create(small_config(tmp_path, "flowbp_sparse", "name=small", "learners.optimizer.moments=int8"))
    moved = Run.resume(small_config(tmp_path, "flowbp_sparse", "name=small", "resume=auto", *elsewhere))
    assert moved.folder == whole.folder


def test_a_checkpoint_that_is_written_beside_the_run_has_no_name_before_all_is_there(tmp_path: Path) -> None:
    """Until `commit` the one before is the newest; a process that dies meanwhile leaves no more than a partial one."""
    checkpoints = saved(tmp_path, 1)
    folder = checkpoints.begin(2)
    own = Fragment("w", (6,), 0, 1, {"master": torch.full((6,), 2.0)})
    weights = {"w": torch.full((6,), 2.0)}
    ours = checkpoints.write(Snapshot(2, weights, {}, {"a": np.full(2, 2)})).result()
    assert checkpoints.steps() == [1] and (folder / "weights.safetensors").is_file()
    copy = Checkpoints(Path(shutil.copytree(tmp_path, tmp_path.with_name("killed"))))
    assert copy.set_damaged_aside() == [] and copy.steps() == [1] and not list(copy.folder.glob("*.partial"))
    checkpoints.commit(2, 9, None, ours | write_state(folder, [own], 0, 1, {}))
    checkpoints.settle()
    assert checkpoints.steps() == [1, 2] and checkpoints.damages(2) == []
    assert checkpoints.weights()[1]["w"].tolist() == [2.0] * 6


def test_a_full_disk_is_said_where_the_result_is_asked_for(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    folder = checkpoints.begin(2)
    (folder / "weights.safetensors").symlink_to("/dev/full")
    writing = checkpoints.write(Snapshot(2, {"w": torch.zeros(6)}, {}, {}))
    with pytest.raises(NoSpace, match=r"the disk became full while weights\.safetensors was written"):
        writing.result()
    checkpoints.abandon(2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_weights_whose_manifest_is_gone_are_not_taken_for_those_of_an_earlier_version(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    shutil.copytree(checkpoints.path(1), checkpoints.folder / "step_000001-backup")  # not one of the run's
    assert checkpoints.steps() == [1]
    (checkpoints.path(1) / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"manifest.json is missing; write the step of another"):
        checkpoints.weights(1)
    shutil.rmtree(checkpoints.path(1) / "engine")
    assert checkpoints.weights(1)[0] == 1
