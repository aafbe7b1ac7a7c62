"""A whole run with secrets in its environment: no file of it or of Ray holds one, and nothing listens elsewhere."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from flowbp_ray.run.folder import Run
from tests.judges.fake import Fake, said
from tests.paths import ROOT
from tests.small import small_overrides

MARK = "5ec2e75ec2e7"
SECRETS = {
    "WANDB_API_KEY": (MARK * 4)[:40],
    "HF_TOKEN": f"hf_{MARK * 3}",
    "OPENAI_API_KEY": f"sk-{MARK * 3}",
    "AWS_SECRET_ACCESS_KEY": MARK * 2,
    "FLOWBP_RAY_REWARD_TOKEN": MARK * 2,
    "RAY_AUTH_TOKEN": MARK * 3,
    "JUDGE_KEY": f"judge-{MARK}",
}
SOCKETS = ["learners.engine=deepspeed", "cluster.transport=nccl"]
"""What opens most sockets: a process group of the learners, and broadcasts (by gloo on CPUs)."""


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder for Ray, whose sockets' paths must be short."""
    folder = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def family(root: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return [root, *root.children(recursive=True)]
    return []


def listening(processes: list[psutil.Process]) -> set[tuple[str, str]]:
    """(program, address) of each socket at which one of them accepts connections, or takes datagrams."""
    found = set()
    for process in processes:
        with suppress(psutil.Error):
            for c in process.net_connections("inet"):
                if c.status == psutil.CONN_LISTEN or (c.status == psutil.CONN_NONE and not c.raddr and c.laddr):
                    found.add((process.name(), c.laddr.ip.removeprefix("::ffff:")))  # which is IPv4 by IPv6
    return found


def object_store(processes: list[psutil.Process]) -> Iterator[bytes]:
    """The parts of Ray's object store that hold data: it is a file in memory that the raylet has open."""
    for process in processes:
        with suppress(psutil.Error, OSError):
            folder = Path(f"/proc/{process.pid}/fd")
            for link in folder.iterdir() if process.name() == "raylet" else ():
                if "plasma" in os.readlink(link) and link.is_file():
                    yield from data_of(link)


def data_of(link: Path) -> Iterator[bytes]:
    """The parts of a sparse file that are no holes."""
    with link.open("rb") as file:
        end, size = 0, os.fstat(file.fileno()).st_size
        while end < size:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:  # holes to the end
                return
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            base = start - start % mmap.ALLOCATIONGRANULARITY
            with mmap.mmap(file.fileno(), end - base, prot=mmap.PROT_READ, offset=base) as part:
                yield part[:]


@pytest.mark.ray
def test_no_secret_is_written_and_nothing_listens_elsewhere(tmp_path: Path, short: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | SECRETS
    env |= {"RAY_TMPDIR": str(short), "RAY_AUTH_MODE": "token", "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    with Fake(lambda body, before: (200, said("Final Score: 4"))) as fake:
        judge = f"judges=[{{name: eye, url: '{fake.url}', role: gate, api_key_env: JUDGE_KEY, "
        overrides = [*small_overrides(tmp_path), "steps=3", "name=mine", "checkpoint.every=1", "tracking.wandb=true",
                     *SOCKETS, judge + "template: {kind: unified_reward_1_5}}]"]  # fmt: skip
        command = [sys.executable, "-m", "flowbp_ray", "train", "shapes_flowbp_sparse", *overrides]
        with (tmp_path / "printed").open("wb") as printed:
            process = subprocess.Popen(command, env=env, stdout=printed, stderr=subprocess.STDOUT, cwd=tmp_path)
        heard, stored = set[tuple[str, str]](), 0
        try:
            while process.poll() is None:
                everyone = family(psutil.Process(process.pid))
                heard |= listening(everyone)
                if fake.bodies:
                    for part in object_store(everyone):
                        stored = max(stored, len(part))
                        assert MARK.encode() not in part
                time.sleep(0.3)
        finally:
            process.kill()
        said_by_it = (tmp_path / "printed").read_text()
        assert process.returncode == 0, said_by_it
        assert {headers["Authorization"] for headers in fake.headers} == {f"Bearer {SECRETS['JUDGE_KEY']}"}
    assert stored > 1_000_000  # so weights were seen there
    assert {name for name, _ in heard} >= {"gcs_server", "raylet"}
    assert {address for _, address in heard} <= {"127.0.0.1", "::1"}, sorted(heard)
    run = Run.open(tmp_path / "mine")
    assert run.checkpoints.steps() and list(run.folder.glob("wandb/offline-run-*"))
    files = [path for folder in (tmp_path, short) for path in folder.rglob("*") if path.is_file()]
    assert any("raylet" in path.name for path in files) and any(path.suffix == ".safetensors" for path in files)
    assert not [path for path in files if MARK.encode() in path.read_bytes()]
