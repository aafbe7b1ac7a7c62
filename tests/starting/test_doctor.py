"""`doctor` on this machine, and with things missing."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from flowbp_ray.starting import doctor
from flowbp_ray.starting.doctor import Line, examine
from tests.small import small_overrides


def named(lines: list[Line], name: str) -> Line:
    [line] = [line for line in lines if line.name == name]
    return line


def test_a_machine_that_runs_these_tests_has_what_a_run_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_never_shown")
    lines = list(examine("shapes_flowbp_sparse", small_overrides(tmp_path), tmp_path))
    assert not [line for line in lines if line.kind == "stop"]
    assert named(lines, "shapes_flowbp_sparse").value.endswith("prompts")
    assert named(lines, "HF_TOKEN").value == "set" and "hf_never_shown" not in str(lines)
    assert named(lines, "torch").value and named(lines, "Ray cluster").value.startswith("RAY_ADDRESS is not set")


def test_what_would_stop_a_run_is_said_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:  # a port that nobody listens at
        listener.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setattr(doctor, "NEEDED", ("ray", "no-such-package"))
        lines = list(examine("shapes_flowbp_sparse", ["data.prompts=nowhere.txt"], tmp_path))
    stops = {line.name: line for line in lines if line.kind == "stop"}
    assert set(stops) == {"no-such-package", "Ray cluster", "shapes_flowbp_sparse"}
    assert "unset RAY_ADDRESS" in stops["Ray cluster"].advice
    assert "nowhere.txt does not exist" in stops["shapes_flowbp_sparse"].advice


def test_a_full_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    lines = list(examine(None, [], tmp_path / "not" / "there"))
    assert {line.name for line in lines if line.kind == "warn"} >= {"output", "/dev/shm"}


def test_the_configurations_folders_and_cluster_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "file").write_text("")
    over = [f"output={tmp_path}/own", f"encoder.cache={tmp_path}/file/cache", "cluster.address=ray://head:10001"]
    lines = list(examine("shapes_flowbp_sparse", [*small_overrides(tmp_path), *over]))
    assert named(lines, "output").value.startswith(f"{tmp_path}/own: ")
    assert "write another encoder.cache" in named(lines, "embedding cache").advice
    assert named(lines, "Ray cluster").value == "cluster.address=ray://head:10001 is no address to join"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert named(list(examine(None, [])), "Ray cluster").kind == "ok"
