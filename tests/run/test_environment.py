"""What a run was started with, against this process and git itself."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from flowbp_ray.run import environment
from flowbp_ray.run.folder import Run
from tests.small import small_config


def test_each_start_is_a_line(tmp_path: Path) -> None:
    config = small_config(tmp_path, "refl", "name=one")
    run = Run.create(config)
    with Run.resume(config).locked(print):
        pass
    with (run.folder / environment.FILE).open("a") as file:
        file.write('{"torn')
    with Run.resume(config).locked(print):
        pass
    starts = environment.read(run.folder)
    assert len(starts) == 3 and environment.read(tmp_path) == []
    for start in starts:
        assert start["versions"]["python"] == platform.python_version()
        assert start["versions"]["torch"] == version("torch") and start["folder"] == str(Path.cwd())
        assert start["command"] == environment.command() and json.loads(json.dumps(start)) == start


def test_the_command_of_another_program_is_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, told in (
        (["/opt/bin/flowbp-ray", "train", "a b"], "flowbp-ray train 'a b'"),
        (["/home/me/my.py", "--token=secret"], "my.py"),
        ([], "python"),
    ):
        monkeypatch.setattr(sys, "argv", given)
        assert environment.command() == told


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_commit_is_gits_and_says_whether_files_differ(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    file, other = tmp_path / "file.py", tmp_path / "untracked.py"
    file.write_text("a = 1\n")
    assert environment.commit_of(file) is None
    git("init", "-q")
    git("add", "file.py")
    git("commit", "-qm", "one")
    other.write_text("b = 1\n")
    head = git("rev-parse", "HEAD")
    assert environment.commit_of(file) == head
    assert environment.commit_of(other) is None
    file.write_text("a = 2\n")
    assert environment.commit_of(file) == f"{head}+changes"
