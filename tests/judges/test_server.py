"""Servers that end as they should: real processes, watched through the process table. vLLM itself: test_vllm.py."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from flowbp_ray.judges import server as module
from flowbp_ray.judges.config import ServerConfig
from flowbp_ray.judges.server import Leashed, Server, ServerFailed, check_python
from tests.judges.fake import Fake
from tests.paths import ROOT

# Starts a child that leaves its session and its parent, as daemons do, and ignores SIGTERM; then does `then`.
FAMILY = """
import os, signal, subprocess, sys, time
code = "import os, signal, time\\nif os.fork(): os._exit(0)\\n"
code += "os.setsid(); signal.signal(signal.SIGTERM, signal.SIG_IGN)\\n"
code += "open({notes!r}, 'a').write(str(os.getpid()) + '\\\\n')\\ntime.sleep(600)"
subprocess.run([sys.executable, "-c", code])
open({notes!r}, 'a').write(str(os.getpid()) + '\\n')
{then}
"""

STAND_IN = str(Path(__file__).with_name("stand_in"))


def until(done: object, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if done():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False


def noted(notes: Path, count: int) -> list[int]:
    """Process ids that a family wrote down."""
    assert until(lambda: notes.exists() and notes.read_text().count("\n") >= count)
    pids = [int(line) for line in notes.read_text().split()]
    assert all(map(psutil.pid_exists, pids))
    return pids


def gone(pids: Sequence[int]) -> bool:
    return not any(map(psutil.pid_exists, pids))


def family(notes: Path, then: str = "time.sleep(600)") -> list[str]:
    return [sys.executable, "-c", FAMILY.format(notes=str(notes), then=then)]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_all_of_it_ends_with_whoever_asked_for_it(tmp_path: Path, how: signal.Signals) -> None:
    notes = tmp_path / "pids"
    asks = (
        "import os, time, pathlib\nfrom flowbp_ray.judges.server import Leashed\n"
        f"held = Leashed({family(notes)!r}, dict(os.environ), pathlib.Path({str(tmp_path / 'log')!r}))\n"
        "while held.pid('pid') is None: time.sleep(0.05)\nprint(held.pid('pid'), flush=True)\ntime.sleep(600)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    asker = subprocess.Popen([sys.executable, "-c", asks], stdout=subprocess.PIPE, env=env)
    assert asker.stdout is not None
    pids = [int(asker.stdout.readline()), *noted(notes, 2)]
    children = [p.pid for p in psutil.Process(asker.pid).children()]
    assert not set(children) & set(pids), "Ray kills direct children first: the leash must not be one"
    asker.send_signal(how)
    asker.wait()
    assert until(lambda: gone(pids)), [psutil.Process(p).cmdline() for p in pids if psutil.pid_exists(p)]


def test_what_a_command_leaves_behind_ends_with_it_and_code_0_is_an_end_too(tmp_path: Path) -> None:
    notes = tmp_path / "pids"
    held = Leashed(family(notes, "time.sleep(1)"), dict(os.environ), tmp_path / "log")
    pids = noted(notes, 2)
    assert held.alive()
    assert until(lambda: not held.alive())
    assert held.code == 0 and gone(pids)
    held.end()


def test_a_killed_leash_takes_the_command_along_and_the_asker_the_rest(tmp_path: Path) -> None:
    script = f"sleep 600 & echo $! >> {tmp_path}/pids; echo $$ >> {tmp_path}/pids; wait"
    held = Leashed(["/bin/sh", "-c", script], dict(os.environ), tmp_path / "log")
    pids = noted(tmp_path / "pids", 2)
    leash = held.pid("pid")
    assert leash is not None
    os.kill(leash, signal.SIGKILL)
    assert until(lambda: not held.alive())
    held.end()
    assert until(lambda: gone(pids))


def test_a_command_that_is_not_there_says_so(tmp_path: Path) -> None:
    held = Leashed(["/no/such/program"], dict(os.environ), tmp_path / "log")
    assert until(lambda: not held.alive())
    held.end()
    assert held.code == 127 and "/no/such/program" in (tmp_path / "log").read_text()


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[Server]:
    """A server whose `vllm.entrypoints.openai.api_server` is a small one, in a process of its own."""
    yield from serving(tmp_path)


def serving(tmp_path: Path, before: str = "", **settings: object) -> Iterator[Server]:
    env = {"PYTHONPATH": STAND_IN, "STAND_IN_SICK": str(tmp_path / "sick"), "STAND_IN_BEFORE": before}
    config = ServerConfig(env=env, **settings)  # type: ignore[arg-type]
    server = Server("/some/model", config, tmp_path / "logs" / "judge-x.log")
    yield server
    server.stop()


def at_work(server: Server) -> int:
    assert server.process is not None
    pid = server.process.pid()
    assert pid is not None and psutil.pid_exists(pid)
    return pid


def test_a_server_that_leaves_with_code_0_is_started_again(stand_in: Server) -> None:
    async def story() -> list[int]:
        pids = []
        for _ in range(2):
            root = await stand_in.ensure(doubt=True)
            assert await stand_in.ensure(doubt=True) == root == await stand_in.ensure()
            pids.append(at_work(stand_in))
            async with module.aiohttp.ClientSession() as session, session.get(f"{root}/leave") as response:
                assert response.status == 200
            assert stand_in.process is not None
            while stand_in.process.alive():
                await asyncio.sleep(0.05)
            assert stand_in.process.code == 0
        return pids

    first, second = asyncio.run(story())
    assert first != second and stand_in.deaths == 1
    assert stand_in.log.read_text().count("serving /some/model") == 2
    stand_in.stop()
    assert gone([first, second])


def test_many_that_doubt_at_once_start_one_server(stand_in: Server) -> None:
    async def story() -> set[str]:
        await stand_in.ensure()
        os.kill(at_work(stand_in), signal.SIGKILL)
        return set(await asyncio.gather(*[stand_in.ensure(doubt=True) for _ in range(20)]))

    assert len(asyncio.run(story())) == 1
    assert stand_in.deaths == 1 and stand_in.log.read_text().count("serving") == 2


def test_a_server_that_stays_sick_is_replaced(
    stand_in: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SICK", 1.0)

    async def story() -> tuple[int, int]:
        await stand_in.ensure()
        before = at_work(stand_in)
        (tmp_path / "sick").touch()
        asyncio.get_running_loop().call_later(2.5, (tmp_path / "sick").unlink)
        await stand_in.ensure(doubt=True)
        return before, at_work(stand_in)

    before, after = asyncio.run(story())
    assert before != after and gone([before])


def test_a_server_that_does_not_come_up_says_why(tmp_path: Path) -> None:
    for server in serving(tmp_path, 'raise RuntimeError("no such model here")', starts=2):

        async def twice(server: Server = server) -> None:
            with pytest.raises(ServerFailed, match=r"2 starts.*RuntimeError: no such model here.*judge-x\.log"):
                await server.ensure()
            with pytest.raises(ServerFailed):  # at once: the others do not wait for the same again
                await server.ensure()

        asyncio.run(twice())
        assert server.log.read_text().count("serving") == 2


def test_an_error_names_the_log_that_people_find(tmp_path: Path) -> None:
    """The server writes on the judge's node, and the run's folder gets a copy."""
    for server in serving(tmp_path, 'raise RuntimeError("no such model here")', starts=1):
        there = Server(server.model, server.settings, server.log, shown=tmp_path / "run" / "judge-x.log")
        with pytest.raises(ServerFailed, match=f"no such model here; see {tmp_path}/run/judge-x.log"):
            asyncio.run(there.ensure())
        assert "no such model here" in server.log.read_text()


def test_a_server_that_is_slow_to_start_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    for server in serving(tmp_path, "import time; time.sleep(600)", starts=1, start_timeout=1.5):
        with pytest.raises(ServerFailed, match="1 start"):
            asyncio.run(server.ensure())
        assert server.process is None


def test_a_configured_port_must_be_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANDOVER", 0.0)
    with Fake(lambda body, before: (200, {})) as stranger:
        port = int(stranger.url.rpartition(":")[2])
        for server in serving(tmp_path, port=port):
            with pytest.raises(ServerFailed, match=rf"server\.port is {port}, where another server.*write another"):
                asyncio.run(server.ensure())
            assert server.process is None and not server.log.exists(), "nothing was started"


def test_a_port_that_is_free_soon_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a lost actor, whose server still ends."""
    held = socket.create_server(("127.0.0.1", 0))

    async def story(server: Server) -> str:
        asyncio.get_running_loop().call_later(1.0, held.close)
        return await server.ensure()

    for server in serving(tmp_path, port=held.getsockname()[1]):
        assert asyncio.run(story(server)) == f"http://127.0.0.1:{server.settings.port}"


def test_a_stranger_at_the_port_is_not_taken_for_our_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes between the look at the port and the start, and ours imports for a while before it finds out."""
    with Fake(lambda body, before: (200, {})) as stranger:
        monkeypatch.setattr(module, "free_port", lambda: int(stranger.url.rpartition(":")[2]))
        for server in serving(tmp_path, "import time; time.sleep(1)", starts=1):
            with pytest.raises(ServerFailed, match=r"1 start.*Address already in use"):
                asyncio.run(server.ensure())


def test_a_server_with_an_api_key_is_recognised(tmp_path: Path) -> None:
    for server in serving(tmp_path, start_timeout=30.0):
        server.key = "secret"
        assert asyncio.run(server.ensure()) == server.root
        with pytest.raises(urllib.error.HTTPError, match="401"):  # it asks for it
            urllib.request.urlopen(f"{server.root}/v1/models")
        assert "secret" not in " ".join(psutil.Process(server.process.pid()).cmdline())


def test_a_dead_server_is_not_trusted_though_nobody_doubts_it(stand_in: Server) -> None:
    """With `tries: 1` there is no second try that would doubt."""

    async def story() -> None:
        await stand_in.ensure()
        os.kill(at_work(stand_in), signal.SIGKILL)
        assert stand_in.process is not None
        while stand_in.process.alive():
            await asyncio.sleep(0.05)
        await stand_in.ensure()

    asyncio.run(story())
    assert stand_in.deaths == 1 and stand_in.log.read_text().count("serving") == 2


def test_the_interpreter_must_have_vllm_in_the_servers_environment(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no vllm: write server\.python"):
        check_python(ServerConfig())
    check_python(ServerConfig(env={"PYTHONPATH": STAND_IN}))
    with pytest.raises(ValueError, match="does not run"):
        check_python(ServerConfig(python=str(tmp_path / "python")))
