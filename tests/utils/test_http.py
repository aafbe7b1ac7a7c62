"""One HTTP exchange with servers that misbehave on a real socket: how long it may last, how much it may bring."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import aiohttp
import pytest

from flowbp_ray.utils.http import TooLarge, ask

GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@contextmanager
def talking(talk: Callable[[socket.socket], object]) -> Iterator[str]:
    """The address of a socket at which `talk` is held with one client after the other."""
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            with suppress(OSError):
                client, _ = listening.accept()
                with client:
                    talk(client)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.1)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            ended.set()
            thread.join()


def drip(client: socket.socket, content: bytes) -> None:
    """A byte in each tenth of a second, which no timeout of a single recv would end."""
    for i in range(len(content)):
        client.sendall(content[i : i + 1])
        time.sleep(0.1)


LATE = {
    "silence": lambda client: client.recv(1 << 16) and client.recv(1),
    "headers that drip": lambda client: drip(client, GOOD),
    "a body that drips": lambda client: client.sendall(GOOD[:-2].replace(b": 2", b": 90")) or drip(client, b"x" * 90),
    "a body without an end": lambda client: client.sendall(b"HTTP/1.1 200 OK\r\n\r\n") or drip(client, b"x" * 90),
    "a body that nobody reads": lambda client: time.sleep(2),
}


@pytest.mark.parametrize("case", LATE)
def test_an_exchange_ends_in_its_time(case: str) -> None:
    body = b"\0" * (1 << 25) if case == "a body that nobody reads" else b""
    with talking(LATE[case]) as url:
        began = time.monotonic()
        with pytest.raises(TimeoutError, match="no whole answer within 1 s"):
            ask(f"{url}/score", "POST", {}, body, 1.0, 1000)
        assert 0.9 < time.monotonic() - began < 1.8


LARGE = {
    "that says so": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
    "in chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"200\r\n" + b"x" * 512 + b"\r\n",
    "until it hangs up": b"HTTP/1.1 200 OK\r\n\r\n",
}


@pytest.mark.parametrize("case", LARGE)
def test_an_answer_has_a_largest_size(case: str) -> None:
    """What comes after it is not read, let alone kept."""

    def talk(client: socket.socket) -> None:
        client.recv(1 << 16)
        client.sendall(LARGE[case])
        while case != "that says so":
            client.sendall(b"200\r\n" + b"x" * 512 + b"\r\n")

    with talking(talk) as url, pytest.raises(TooLarge, match="more than 1000"):
        ask(f"{url}/score", "POST", {}, b"", 30.0, 1000)


def test_an_answer_of_the_largest_size_is_taken() -> None:
    """Bytes and status arrive; a Retry-After that is no number of seconds counts as none."""
    extra = "Retry-After: ²\r\n".encode("latin-1")
    with talking(
        lambda client: (client.recv(1 << 16), client.sendall(GOOD.replace(b"\r\n\r\n", b"\r\n" + extra + b"\r\n")))
    ) as url:
        answer = ask(f"{url}/score", "POST", {}, b"", 30.0, 2)
        assert (answer.status, answer.retry_after, answer.content) == (200, 0.0, b"ok")
        with pytest.raises(TooLarge):
            ask(f"{url}/score", "POST", {}, b"", 30.0, 1)


def test_a_caller_with_a_running_loop_may_ask_too() -> None:
    """As in a notebook, whose thread cannot run a second loop."""

    async def cell() -> bytes:
        return ask(f"{url}/health", "GET", {}, None, 30.0, 1000).content

    with talking(lambda client: (client.recv(1 << 16), client.sendall(GOOD))) as url:
        assert asyncio.run(cell()) == b"ok"


def test_what_is_wrong_with_a_connection_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(ConnectionRefusedError, match="Connection refused"):
        ask(f"http://127.0.0.1:{port}", "GET", {}, None, 30.0, 1000)
    with pytest.raises(socket.gaierror):
        ask("http://no-such-host.invalid", "GET", {}, None, 30.0, 1000)
    with pytest.raises(aiohttp.ClientError, match="no blanks or control characters"):
        ask("http://127.0.0.1/a b", "GET", {}, None, 30.0, 1000)
    with talking(lambda client: (client.recv(1 << 16), client.sendall(GOOD))) as url, pytest.raises(ssl.SSLError):
        ask(url.replace("http:", "https:"), "GET", {}, None, 30.0, 1000)


def test_no_time_is_not_all_the_time() -> None:
    with talking(lambda client: client.recv(1 << 16) and client.recv(1)) as url, pytest.raises(TimeoutError):
        ask(url, "GET", {}, None, 0.0, 1000)
