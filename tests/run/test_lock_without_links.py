"""The lock where the file system knows no hard links: refused by the kernel itself, and on FAT where that is there."""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowbp_ray.run.lock import FILE, RunLock
from flowbp_ray.utils.errors import ConfigError, RunFailed
from flowbp_ray.utils.files import write_atomically
from tests.paths import ROOT

CODES = ("EPERM", "EOPNOTSUPP", "EMLINK", "ENOSYS")

REFUSING = """
import ctypes, json, os, sys, time
from pathlib import Path
from flowbp_ray.run.lock import FILE, RunLock
from flowbp_ray.utils.errors import ConfigError

class Filter(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint)]

class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.POINTER(Filter))]

def refuse_links(code):
    # seccomp(2): load the number of the call; the two that make links return `code`, all others go on.
    lines = [(0x20, 0, 0, 0), (0x15, 1, 0, 86), (0x15, 0, 1, 265), (6, 0, 0, 0x50000 | code), (6, 0, 0, 0x7FFF0000)]
    filters = (Filter * len(lines))(*(Filter(*line) for line in lines))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    program = Program(len(lines), filters)
    assert libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0, ctypes.get_errno()  # PR_SET_SECCOMP
    try:
        os.link(__file__, "linked")
    except OSError as error:
        assert error.errno == code
    else:
        raise AssertionError("a link was made")

def contend(folder, ready):
    while not ready.exists():
        pass
    try:
        with RunLock(folder, lambda line: None, beat=0.02, patience=0.2) as lock:
            time.sleep(0.3)
            lock.check()
    except ConfigError as error:
        assert "is running already, in process" in str(error), error
        os._exit(2)
    os._exit(0)

base, code, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
if code:
    refuse_links(code)
for number in range(rounds):
    folder, ready = base / str(number), base / f"{number}.ready"
    folder.mkdir()
    if number % 2:  # the lock of a driver that is gone
        stale = RunLock(folder, print).ours | {"started": 5, "token": "stale"}
        (folder / FILE).write_text(json.dumps(stale))
    pids = []
    for _ in range(5):
        pid = os.fork()
        if pid == 0:
            try:
                contend(folder, ready)
            finally:
                os._exit(3)
        pids.append(pid)
    ready.touch()
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)
    assert codes == [0, 2, 2, 2, 2], codes
    assert not list(folder.iterdir()), list(folder.iterdir())
print("one at a time")
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers of the kernel's calls are those of x86-64")
@pytest.mark.parametrize("code", ["none", *CODES[:2]])
def test_of_five_drivers_one_holds_the_lock(code: str, tmp_path: Path) -> None:
    """Where the kernel makes links, and where it refuses them (seccomp); over no lock, and over a stale one."""
    file = tmp_path / "contend.py"
    file.write_text(REFUSING)
    number = 0 if code == "none" else getattr(errno, code)
    done = subprocess.run(
        [sys.executable, str(file), str(tmp_path), str(number), "6"],
        capture_output=True, text=True, timeout=200, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("one at a time\n", "")


def without_links(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    def link(source: object, target: object) -> None:
        number = getattr(errno, code)
        raise OSError(number, os.strerror(number), str(source), None, str(target))

    monkeypatch.setattr(os, "link", link)


def held_and_taken_over(folder: Path) -> None:
    """A lock is held, refused to others, given back, and taken over from a driver that is gone."""
    said: list[str] = []
    with RunLock(folder, said.append, beat=0.02) as lock:
        lock.ended.wait(0.1)
        assert json.loads((folder / FILE).read_text())["token"] == lock.ours["token"]
        with pytest.raises(ConfigError, match=rf"running already, in process {os.getpid()} on"):
            RunLock(folder, print).__enter__()
        lock.check()
    assert not list(folder.iterdir()) and not said
    (folder / FILE).write_text(json.dumps(lock.ours | {"started": 5, "token": "gone"}))
    with RunLock(folder, said.append):
        assert len(said) == 1
    (folder / FILE).write_text("")  # of a driver that was killed before it had filled it
    with RunLock(folder, said.append, beat=0.01, patience=0.05):
        assert len(said) == 2
    assert not list(folder.iterdir())


@pytest.mark.parametrize("code", CODES)
def test_a_file_that_must_be_new_is_the_lock(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_links(monkeypatch, code)
    held_and_taken_over(tmp_path)


def test_a_lock_that_is_being_written_is_somebodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is there before its content: it is waited for, and then names the process."""
    without_links(monkeypatch, "EPERM")
    other = RunLock(tmp_path, print)
    (tmp_path / FILE).write_text("")
    reads = iter(["", "", *[json.dumps(other.ours)] * 9])
    monkeypatch.setattr(
        RunLock, "_read", lambda self, read=RunLock._read: (self.file.write_text(next(reads)), read(self))[1]
    )
    with pytest.raises(ConfigError, match=rf"running already, in process {os.getpid()} on"):
        RunLock(tmp_path, print, beat=0.02, patience=5).__enter__()


@pytest.mark.parametrize("torn", ["", '{"host": "he', "[]", '{"token": null}'])
def test_a_lock_that_cannot_be_read_is_no_proof_that_it_is_lost(tmp_path: Path, torn: str) -> None:
    """As where another driver has moved it aside and is putting it back; a missing one is proof for what is saved."""
    with RunLock(tmp_path, print, beat=0.01) as lock:
        (tmp_path / FILE).write_text(torn)
        lock.check()
        lock.ended.wait(0.2)
        assert not lock.lost
        lock.check()
        assert json.loads((tmp_path / FILE).read_text())["token"] == lock.ours["token"]  # written again by a count
        with pytest.raises(RunFailed, match="another driver has taken"):
            for _ in range(100):  # a count that was under way may write ours over it
                (tmp_path / FILE).write_text(json.dumps(lock.ours | {"token": "another"}))
                lock.check()


def test_the_lock_is_read_before_its_name_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe holds up whoever reads what is put back; until then nobody must see an empty lock."""
    without_links(monkeypatch, "EPERM")
    lock, whole = RunLock(tmp_path, print), tmp_path / "whole"
    os.mkfifo(whole)
    placing = threading.Thread(target=lock._place, args=(whole,), daemon=True)
    placing.start()
    with whole.open("w") as slow:
        placing.join(0.2)
        assert placing.is_alive() and not (tmp_path / FILE).exists()
        slow.write(json.dumps(lock.ours))
    placing.join(20)
    assert json.loads((tmp_path / FILE).read_text()) == lock.ours


def test_another_error_of_a_link_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_links(monkeypatch, "EIO")
    with pytest.raises(OSError, match="Input/output error"):
        RunLock(tmp_path, print).__enter__()
    assert not list(tmp_path.iterdir())


def test_a_file_system_that_cannot_rename_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match=r"cannot rename files; name a folder on a disk, .*config\.yaml") as caught:
        write_atomically(tmp_path / "config.yaml", lambda path: path.write_text("a: 1"))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.fixture
def fat(tmp_path: Path) -> Iterator[Path]:
    """A folder on FAT, in a file that is mounted."""
    make = shutil.which("mkfs.vfat") or shutil.which("mkfs.fat")
    if os.getuid() != 0 or make is None or shutil.which("mount") is None:
        pytest.skip("mounting FAT takes root, mkfs.vfat and mount")
    image, at = tmp_path / "fat.img", tmp_path / "fat"
    image.write_bytes(bytes(4 << 20))
    at.mkdir()
    subprocess.run([make, str(image)], check=True, capture_output=True)
    mounted = subprocess.run(["mount", "-o", "loop", "-t", "vfat", str(image), str(at)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"FAT cannot be mounted here: {mounted.stderr.strip()}")
    yield at
    subprocess.run(["umount", str(at)], check=True)


def test_on_fat(fat: Path) -> None:
    (fat / "a").touch()
    with pytest.raises(OSError):
        os.link(fat / "a", fat / "b")
    (fat / "run").mkdir()
    held_and_taken_over(fat / "run")
