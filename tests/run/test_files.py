"""Files of a run are whole: before, during and after a write, and on the disk where that is asked for."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flowbp_ray.config import loading
from flowbp_ray.run.checkpoint import Checkpoints, Snapshot
from flowbp_ray.run.folder import Run
from flowbp_ray.utils.errors import ConfigError, os_error_line
from flowbp_ray.utils.files import naming, write_atomically
from tests.limits import files_of_at_most
from tests.small import small_config


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was flushed to the disk and of what was renamed, in order."""
    events: list[str] = []
    replace, fsync = os.replace, os.fsync

    def renamed(old: Any, new: Any) -> None:
        events.append(f"rename to {Path(new).name}")
        replace(old, new)

    def flushed(handle: int) -> None:
        events.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        fsync(handle)

    monkeypatch.setattr(os, "replace", renamed)
    monkeypatch.setattr(os, "fsync", flushed)
    return events


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda partial: partial.write_text("old"))

    def fail(partial: Path) -> None:
        partial.write_text("half of the n")
        assert path.read_text() == "old"
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, fail, fsync=True)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "gone" / "file", lambda partial: partial.write_text("new"))
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_writing_names_the_file(tmp_path: Path) -> None:
    """/dev/full (full(4)) refuses every byte, with an error that knows no name."""
    with pytest.raises(OSError, match=r"No space left on device: .*/the_file'") as found:
        write_atomically(tmp_path / "the_file", lambda partial: Path("/dev/full").write_text("x"))
    assert found.value.filename == str(tmp_path / "the_file")
    with pytest.raises(FileNotFoundError, match="other"), naming(tmp_path / "the_file"):
        (tmp_path / "other").read_text()


def test_a_file_is_on_the_disk_before_its_name_and_the_name_before_it_returns(
    tmp_path: Path, synced: list[str]
) -> None:
    write_atomically(tmp_path / "plain", lambda partial: partial.write_text("x"))
    assert synced == ["rename to plain"]
    del synced[:]
    write_atomically(tmp_path / "sure", lambda partial: partial.write_text("x"), fsync=True)
    first, *others = synced
    assert first.startswith("fsync .sure.") and others == ["rename to sure", f"fsync {tmp_path.name}"]


def test_a_runs_configuration_is_on_the_disk_and_read_once(
    tmp_path: Path, synced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(tmp_path, "flowbp_sparse", "name=kept")
    run = Run.create(config)
    assert synced[-2:] == ["rename to config.yaml", "fsync kept"] and synced[-3].startswith("fsync .config.yaml.")
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "environment.jsonl",
        "images",
    ]
    opened, reads = Run.open(run.folder), []
    monkeypatch.setattr("flowbp_ray.run.folder.load", lambda path: reads.append(path) or loading.load(path))
    assert opened.config == config and opened.config is opened.config
    assert reads == [run.folder / "config.yaml"]


def test_the_evaluations_of_a_checkpoint_are_replaced_when_the_last_answer_came(
    tmp_path: Path, synced: list[str]
) -> None:
    checkpoints, weights = Checkpoints(tmp_path), {"w": torch.arange(3.0)}
    checkpoints.begin(2)
    left = {"images|2|1.0": np.zeros((1, 2, 2, 3), np.uint8)}
    checkpoints.finish(Snapshot(2, weights, {}, {"a": np.arange(2)}, weights, left), keep=1)
    checkpoints.settle()
    assert checkpoints.has_average(2) and list(checkpoints.unjudged(2)) == ["images|2|1.0"]
    del synced[:]
    checkpoints.replace_evaluations(2, {"a": np.arange(2), "judge": np.arange(3)})
    assert checkpoints.evaluations(2)["judge"].tolist() == [0, 1, 2] and checkpoints.unjudged(2) == {}
    renamed = [event for event in synced if event.startswith("rename")]
    assert renamed == ["rename to manifest.json", "rename to evaluations.npz", "rename to manifest.json"]
    assert synced[-2:] == ["fsync step_000002", "fsync step_000002"] and len(synced) == 3 * 3 + 1
    names = sorted(path.name for path in checkpoints.path(2).iterdir())
    assert names == ["average.safetensors", "evaluations.npz", "manifest.json", "weights.safetensors"]


def test_newer_checkpoints_are_removed_but_a_spared_one_stays(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.begin(step)
        checkpoints.finish(Snapshot(step, {"w": torch.tensor([float(step)])}, {}, {}), keep=1, spare=1)
    checkpoints.settle()
    assert checkpoints.steps() == [1, 3]


def test_what_safetensors_cannot_write_is_an_error_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "the_file"
    with files_of_at_most(1 << 16), pytest.raises(OSError, match="File too large") as found:
        write_atomically(path, lambda partial: save_file({"weight": torch.zeros(1 << 16)}, partial))
    assert (found.value.errno, found.value.filename) == (errno.EFBIG, str(path))
    assert os_error_line(found.value).startswith(f"{path}: File too large; ")
    assert not list(tmp_path.iterdir())


def test_what_is_written_aside_has_the_name_that_it_will_have(tmp_path: Path) -> None:
    partial, path = tmp_path / ".the_folder.partial", tmp_path / "the_folder"
    with pytest.raises(FileNotFoundError) as found, naming(path, partial):
        (partial / "README.md").write_text("text")
    assert found.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as other, naming(path, partial):
        (tmp_path / "source").read_text()
    assert other.value.filename == str(tmp_path / "source")


def test_a_run_folder_that_cannot_be_made_is_refused_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    for output, why in ((tmp_path / "notes", "in the way"), (tmp_path / "notes" / "runs", "a file is where a folder")):
        config = small_config(tmp_path, "flowbp_sparse", f"output={output}")
        for start in (Run.create, Run.resume):
            with pytest.raises(ConfigError, match=rf"^output: {tmp_path}/notes.*; .*{why}"):
                start(config)
    assert (tmp_path / "notes").read_text() == "mine"
