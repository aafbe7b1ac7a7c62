"""What is said before a run has a folder, and which folder its actors read from. No Ray is started."""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
from pathlib import Path

import pytest

from actors import cluster, private_ray
from actors.cluster import check_job, connect, held_back, join
from actors.learner import LearnerActor
from actors.process import FOLDER, actor_options, change_folder
from flowbp_ray.utils.console import guarded
from flowbp_ray.utils.errors import RunFailed
from flowbp_ray.utils.settings import ProcessConfig
from tests.chaos.disk import Disk, mountable


def as_job(monkeypatch: pytest.MonkeyPatch, **runtime_env: str) -> None:
    monkeypatch.setenv(cluster.JOB, json.dumps({"runtime_env": runtime_env, "metadata": {}}))


def test_an_output_in_a_jobs_copy_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(cluster.STOP, "600")
    as_job(monkeypatch, working_dir="gcs://_ray_pkg_0.zip")
    for lost in ("runs", ".", str(tmp_path / "runs")):
        with pytest.raises(ValueError, match="a copy that Ray deletes; write output=/a/folder"):
            connect("local", lost)
    check_job(str(tmp_path.parent))
    as_job(monkeypatch)  # a job without a working directory runs where the node's Ray was started
    check_job("runs")


def test_a_job_that_cannot_save_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    as_job(monkeypatch)
    monkeypatch.delenv(cluster.STOP, raising=False)
    with caplog.at_level(logging.WARNING):
        check_job("/shared")
        monkeypatch.setenv(cluster.STOP, "600")
        check_job("/shared")
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "`ray job stop` will kill this run after 3 s"
    ]


@pytest.mark.parametrize("address", ["http://head:8265", "ray://head:10001"])
def test_an_address_that_is_none(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ValueError, match="is no address of a cluster to join; write host:6379"):
        join(address)


def test_no_cluster_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowbp_ray.driver import train
    from tests.small import small_config

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"  # bound and not listening
        with pytest.raises(ConnectionError, match=f"no Ray cluster answers at {address} \\(Connection refused\\)"):
            train(small_config(tmp_path, "flowbp_sparse", f"cluster.address={address}"))
    assert not list(tmp_path.iterdir())


def test_what_rays_core_says_is_held_back(capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    with pytest.raises(KeyError), held_back(said):
        os.write(2, b"InvalidAuthToken\n")
        raise KeyError
    os.write(2, b"after\n")
    assert said == ["InvalidAuthToken\n"] and capfd.readouterr().err == "after\n"


VERSIONS = """Version mismatch: The cluster was started with:
    Ray: 2.50.0
    Python: 3.11.9
This process on node 10.0.0.1 was started with:
    Ray: 2.60.0
    Python: 3.11.11
"""


def failing(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """ray.init writes a line as Ray's core does and raises `error`."""

    def init(**_: object) -> None:
        os.write(2, b"said by Ray\n")
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.ray, "init", init)


def test_another_version_of_ray_is_one_line_with_both(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    failing(RuntimeError(VERSIONS), monkeypatch)
    with pytest.raises(SystemExit) as stop:
        guarded(lambda: join("auto"))
    assert stop.value.code == 2
    line = "the Ray cluster at auto has Ray 2.50.0 on Python 3.11.9, this process Ray 2.60.0 on Python 3.11.11"
    said = capfd.readouterr().err
    assert said.startswith(f"flowbp-ray: {line};") and said.count("\n") == 1


def test_rays_own_message_of_other_versions_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.utils import check_version_info, compute_version_info

    with pytest.raises(RuntimeError) as raised:
        check_version_info({"ray_version": "1.0.0", "python_version": "3.1.4"}, "node 10.0.0.1")
    failing(raised.value, monkeypatch)
    version, python = compute_version_info()
    with pytest.raises(
        ConnectionError, match=rf"has Ray 1\.0\.0 on Python 3\.1\.4, .* Ray {version} on Python {python};"
    ):
        join("auto")


@pytest.mark.parametrize("error", [RuntimeError("called twice"), KeyboardInterrupt()])
def test_what_ray_said_before_another_error_is_not_lost(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    failing(error, monkeypatch)
    with pytest.raises(type(error)):
        join("auto")
    assert capfd.readouterr().err == "said by Ray\n"


def test_a_private_ray_is_started_the_same_way_by_a_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[str, object] = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", lambda **options: taken.update(options))
    monkeypatch.setattr(private_ray, "end_unused", lambda: taken.update(ended=True))
    for name in private_ray.PRIVATE:
        monkeypatch.delenv(name, raising=False)
    cluster.start_ray("local", num_gpus=9, resources={"fast": 2})
    assert taken["num_gpus"] == 9 and taken["resources"] == {"fast": 2} and taken["include_dashboard"] is False
    assert taken["ended"]
    assert {name: os.environ.pop(name) for name in private_ray.PRIVATE} == private_ray.PRIVATE


def test_a_private_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray raises a bare Exception, or a RuntimeError, where its processes do not start."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    failing(Exception("The current node timed out during startup. Why?\nMore."), monkeypatch)
    with pytest.raises(
        RunFailed, match=rf"did not start .*during startup\. Why\?; .* in {tmp_path}/ray/session"
    ) as failed:
        cluster.start_ray("local")
    assert "\n" not in str(failed.value)
    failing(KeyboardInterrupt(), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        cluster.start_ray("local")


def test_a_folder_that_cannot_hold_the_files_of_a_private_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / "a_scratch_folder_of_a_cluster" / "slurm_jobdir" / "1234567" / "tmp.node0016"
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with pytest.raises(ValueError, match=r"RAY_TMPDIR=.* is too long for Ray's sockets .*; set a short folder"):
        private_ray.check_folder()


@pytest.mark.skipif(not mountable(), reason="mounts a disk of its own, as root")
def test_a_full_or_read_only_disk_is_said_before_a_private_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short, Disk(Path(short)) as disk:
        monkeypatch.setenv("RAY_TMPDIR", short)
        private_ray.check_folder()
        (disk.folder / "file").write_text("mine")
        disk.fill()
        with pytest.raises(ValueError, match=rf"RAY_TMPDIR={short} has no room for Ray's logs \(0 B are free"):
            private_ray.check_folder()
        disk.empty()
        disk.fill_with_files()
        with pytest.raises(ValueError, match=r"\(no inode is free\); set a short folder"):
            private_ray.check_folder()
        disk.empty()
        disk.freeze(disk.folder)
        with pytest.raises(ValueError, match=rf"^{short} cannot be written to, and RAY_TMPDIR={short} is where"):
            private_ray.check_folder()


def test_actors_read_where_the_driver_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "driver", tmp_path / "worker"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    [value] = [v for k, v in actor_options(ProcessConfig(), 0)["runtime_env"]["env_vars"].items() if k == FOLDER]
    monkeypatch.chdir(there)
    monkeypatch.setenv(FOLDER, value)
    change_folder()
    assert Path.cwd() == here
    monkeypatch.setenv(FOLDER, str(tmp_path / "not on this node"))
    change_folder()
    assert Path.cwd() == here


def test_a_learner_without_the_runs_folder(tmp_path: Path) -> None:
    LearnerActor().check_folder_visible(str(tmp_path))
    with pytest.raises(ValueError, match="write output=/a/folder that every node sees"):
        LearnerActor().check_folder_visible(str(tmp_path / "elsewhere"))
