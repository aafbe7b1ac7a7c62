"""One question to a reward server and its answer over HTTP, bounded in time and in size."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

CONNECT = 10.0  # seconds for a connection, and for an answer of /health
DIGEST = "Flowbp-Ray-Digest"  # header of a request: the server's settings that the run has agreed with
LARGEST_LINE = 1 << 20  # bytes of an answer that holds no arrays: /health, and what is wrong


class TooLarge(http.client.HTTPException):
    """An answer that has more bytes than anything that was asked for."""


def ask(
    url: str, method: str, path: str, headers: Mapping[str, str], body: bytes | None, seconds: float, largest: int
) -> tuple[int, float, bytes]:
    """One HTTP exchange over a connection of its own: status, seconds of Retry-After (0 without), and content.

    seconds: for everything after the connection, however slowly bytes come. largest: bytes of the content.
    https is verified against the system's certificates, or those that SSL_CERT_FILE names. Raises OSError (of which
    TimeoutError is for an answer that is not there in time) and http.client.HTTPException (of which `TooLarge`).
    """
    parts = urlsplit(url)
    assert parts.hostname is not None
    port = 443 if parts.scheme == "https" else 80
    connection = http.client.HTTPConnection(parts.hostname, parts.port or port)
    connection.default_port, connection.sock = port, _connected(parts, parts.port or port)
    sent = dict(headers) if body is None else {"Content-Type": "application/octet-stream", **headers}
    try:
        with _ended(connection.sock, seconds):
            if isinstance(connection.sock, ssl.SSLSocket):
                connection.sock.do_handshake()
            # a server that refuses before it has read everything breaks the pipe, and its answer says why
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, parts.path + path, body, sent)
            response = connection.getresponse()
            again = response.headers.get("Retry-After", "")
            return (
                response.status,
                float(again) if again.isascii() and again.isdigit() else 0.0,
                _content(response, largest),
            )
    finally:
        connection.close()


def _connected(parts: SplitResult, port: int) -> socket.socket:
    """A connection to the host of an address, for https without its handshake. Raises OSError."""
    try:
        plain = socket.create_connection((parts.hostname, port), CONNECT)
    except TimeoutError as error:  # of the connection, not of the answer
        raise ConnectionError(f"no connection within {CONNECT:.0f} s") from error
    plain.settimeout(None)  # from here on `_ended` keeps the time
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if parts.scheme != "https":
        return plain
    context = ssl.create_default_context()
    return context.wrap_socket(plain, server_hostname=parts.hostname, do_handshake_on_connect=False)


@contextlib.contextmanager
def _ended(connection: socket.socket, seconds: float) -> Iterator[None]:
    """End a connection after `seconds`; a socket's own timeout is for each part, and a peer could drip. TimeoutError.

    Shut down as a plain socket: that of ssl would forget its state while another thread reads from it.
    """
    late = threading.Event()

    def end() -> None:
        late.set()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(connection, socket.SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError):
        if not late.is_set():
            raise
    finally:
        timer.cancel()
    if late.is_set():  # also where what had come looked like all
        raise TimeoutError(f"no whole answer within {seconds:.0f} s")


def _content(response: http.client.HTTPResponse, largest: int) -> bytes:
    """All of an answer. Raises `TooLarge`, and IncompleteRead where less came than its header says."""
    if response.length is not None and response.length > largest:
        raise TooLarge(f"an answer of {response.length} bytes, more than {largest}")
    content = response.read(largest + 1)
    if len(content) > largest:
        raise TooLarge(f"an answer of more than {largest} bytes")
    if response.length:  # which `read` with a size passes over in silence
        raise http.client.IncompleteRead(content, response.length)
    return content


def reason(content: bytes) -> str:
    """The line in which a server says what is wrong."""
    try:
        plain: Any = json.loads(content)
        text = str(plain["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        text = content[:200].decode(errors="replace")
    return " ".join(text.split())[:300] or "nothing"


def line(error: Exception) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
