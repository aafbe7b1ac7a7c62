"""A vLLM server of our own: started, waited for, started again when it ends, ended with the process that started it."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import aiohttp
import psutil

from flowbp_ray.judges.client import JudgeRefused, Unanswered, as_json
from flowbp_ray.judges.config import ServerConfig
from flowbp_ray.judges.parsing import Unparsable
from flowbp_ray.utils.addresses import bearer, free_port
from flowbp_ray.utils.errors import RunFailed

LEASH = Path(__file__).with_name("leash.py")
POLL = 0.5  # seconds between two requests of /health
SICK = 30.0  # seconds for which a server that was healthy may fail /health before it is ended
HANDOVER = 10.0  # seconds for which a configured port may still be taken before a start, by a server that is ending


class ServerFailed(RunFailed):
    """The server does not come up."""


def command(model: str, served_as: str, port: int, settings: ServerConfig) -> list[str]:
    """vLLM's OpenAI-compatible server by module: a CPU build of vLLM has no `vllm` command."""
    python = settings.python or sys.executable
    own = ["--model", model, "--served-model-name", served_as, "--host", "127.0.0.1", "--port", str(port)]
    return [python, "-m", "vllm.entrypoints.openai.api_server", *own, *settings.args]


class Server:
    """A vLLM server process. Any exit is a failure, also with code 0: a server whose engine died ends like that.

    served_as: the model's name at this start only: a server at the port that does not list it is not ours.
    """

    def __init__(
        self, model: str, settings: ServerConfig, log: Path, key: str | None = None, shown: Path | None = None
    ) -> None:
        """key: the API key that the server is to ask for; None: it asks for none, unless `settings.env` gives it one.
        shown: where people find the log; None: there.
        """
        self.model, self.settings, self.log = model, settings, log
        self.shown, self.key = shown or log, key
        self.served_as = ""
        self.process: Leashed | None = None
        self.healthy = False
        self.deaths = 0
        self.port = 0
        self.lock = asyncio.Lock()
        self.given_up: ServerFailed | None = None

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def ensure(self, doubt: bool = False) -> str:
        """The root URL of a server that is up; starts it where there is none. Raises ServerFailed.

        After a failure each call raises at once, until `given_up` is cleared. doubt: ask /health first.
        """
        if self.healthy and not doubt and self._runs():
            return self.root
        async with self.lock:  # one call looks after the server, the others wait for the result
            if self.given_up is not None:
                raise self.given_up
            limit = aiohttp.ClientTimeout(total=10)
            try:
                async with aiohttp.ClientSession(headers=bearer(self.key), timeout=limit) as session:
                    if not (self.healthy and await self._stays(session)):
                        await self._bring_up(session)
            except ServerFailed as error:
                self.given_up = error
                raise
        return self.root

    async def _bring_up(self, session: aiohttp.ClientSession) -> None:
        for _ in range(self.settings.starts):
            await self._start()
            if await self._comes_up(session):
                return
            self.stop()
        times = f"{self.settings.starts} start{'s' * (self.settings.starts > 1)}"
        why = f"{self.last_words()}; see {self.shown}"
        raise ServerFailed(f"the judge's server did not come up ({times}): {why}")

    def stop(self) -> None:
        """End the process and all below it; returns when they are gone."""
        self.healthy = False
        if self.process is not None:
            self.process.end()
            self.process = None

    def last_words(self) -> str:
        """The last line of the log that names an error, or the last one."""
        with suppress(OSError), self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 20_000))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
            errors = [line for line in lines if "Error" in line]
            return (errors or lines or ["nothing in its log"])[-1][-300:]
        return "it has no log"

    async def _start(self) -> None:
        self.stop()
        self.port = free_port() if self.settings.port is None else await left_free(self.settings.port)
        self.served_as = f"judge-{secrets.token_hex(8)}"
        self.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # others on the node need not read it
        started = command(self.model, self.served_as, self.port, self.settings)
        self.process = Leashed(started, environment(self.settings, self.key), self.log)

    def _runs(self) -> bool:
        return self.process is not None and self.process.alive()

    async def _comes_up(self, session: aiohttp.ClientSession) -> bool:
        until = time.monotonic() + self.settings.start_timeout
        while time.monotonic() < until and self._runs():
            if await _serves(session, self.root, self.served_as) and self._runs():
                self.healthy = True
                return True
            await asyncio.sleep(POLL)
        return False

    async def _stays(self, session: aiohttp.ClientSession) -> bool:
        """Whether a server that was healthy still is; otherwise it is counted in `deaths` and ended."""
        until = time.monotonic() + SICK
        while time.monotonic() < until and self._runs():
            if await _serves(session, self.root, self.served_as):
                return True
            await asyncio.sleep(POLL)
        self.deaths += 1
        self.stop()
        return False


class Leashed:
    """A command run by `leash.py`: it and all its descendants end when this process does, or at `end`."""

    def __init__(self, arguments: Sequence[str], env: dict[str, str], log: Path) -> None:
        starter = subprocess.Popen(
            [sys.executable, "-I", str(LEASH), str(log), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
        )
        assert starter.stdin is not None and starter.stdout is not None
        self.lifeline, self.reports = starter.stdin, starter.stdout
        starter.wait()  # it goes on in a fork
        os.set_blocking(self.reports.fileno(), False)
        self.said, self.gone = b"", False
        self.code: int | None = None

    def alive(self) -> bool:
        """Whether the command runs; reads what the leash has said since."""
        while not self.gone:
            part = self.reports.read(4096)
            if part is None:  # nothing new
                break
            self.said += part
            self.gone = not part
        for line in self.said.split(b"\n")[:-1]:
            if line.startswith(b"exit "):
                self.code = int(line[5:])
        return self.code is None and not self.gone

    def pid(self, of: str = "command") -> int | None:
        """Process id of the `command`, or of the leash (`pid`), once it has said so."""
        self.alive()
        for line in self.said.split(b"\n")[:-1]:
            if line.startswith(of.encode() + b" "):
                return int(line.split()[1])
        return None

    def end(self, patience: float = 20.0) -> None:
        """Close the lifeline and wait until the leash is gone; where it was killed, end its session ourselves."""
        with suppress(OSError):
            self.lifeline.close()
        until = time.monotonic() + patience
        while self.alive() or not self.gone:
            if time.monotonic() > until:
                break
            time.sleep(0.02)
        leash = self.pid("pid")
        if self.code is None and leash is not None:
            for pid in of_session(leash):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.reports.close()


def of_session(session: int) -> list[int]:
    """Process ids of a session: what a killed leash may leave behind."""
    found = []
    for pid in psutil.pids():
        with suppress(ProcessLookupError, PermissionError):  # gone since, or another user's
            if os.getsid(pid) == session:
                found.append(pid)
    return found


def environment(settings: ServerConfig, key: str | None = None) -> dict[str, str]:
    """Our environment variables without those that lead another interpreter to our packages, and `server.env`.

    key: the API key, which vLLM reads from VLLM_API_KEY; as an argument other users would see it, and its log would.
    """
    ours = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return ours | ({} if key is None else {"VLLM_API_KEY": key}) | settings.env


async def left_free(port: int) -> int:
    """The configured port, once nothing accepts connections there. Raises ServerFailed after `HANDOVER` seconds."""
    until = time.monotonic() + HANDOVER
    while taken(port):
        if time.monotonic() > until:
            raise ServerFailed(
                f"server.port is {port}, where another server takes connections; write another one, or null, which "
                "picks a free one at every start"
            )
        await asyncio.sleep(POLL)
    return port


def taken(port: int) -> bool:
    """Whether something accepts connections at the port of this machine."""
    with socket.socket() as s:
        s.settimeout(1.0)
        return s.connect_ex(("127.0.0.1", port)) == 0


async def _serves(session: aiohttp.ClientSession, root: str, model: str) -> bool:
    """Whether /health says 200 and /v1/models knows the model."""
    with suppress(aiohttp.ClientError, asyncio.TimeoutError, OSError, JudgeRefused, Unanswered, Unparsable):
        async with session.get(f"{root}/health", allow_redirects=False) as response:
            if response.status != 200:
                return False
        listed = (await as_json(session, "GET", f"{root}/v1/models")).get("data")
        return isinstance(listed, list) and any(isinstance(one, dict) and one.get("id") == model for one in listed)
    return False


def check_python(settings: ServerConfig) -> None:
    """Raises ValueError where the interpreter has no vLLM. Asks it, without importing vLLM (which takes seconds)."""
    path = settings.python or sys.executable
    ask = "import importlib.util, sys; sys.exit(0 if importlib.util.find_spec('vllm') else 3)"
    try:
        done = subprocess.run([path, "-c", ask], capture_output=True, timeout=60, env=environment(settings))
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"server.python is {path!r}, which does not run: {error}") from error
    if done.returncode:
        raise ValueError(
            f"{path} has no vllm: write server.python, the interpreter of an environment with vLLM, or "
            "pip install 'flowbp-ray[judge]' into this one"
        )
