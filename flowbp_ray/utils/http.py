"""One HTTP exchange, bounded in time and in size: with reward servers, and with the servers of judges."""

from __future__ import annotations

import asyncio
import io
import os
import ssl
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import aiohttp

CONNECT = 10.0  # seconds for a connection


class TooLarge(aiohttp.ClientError):
    """An answer that has more bytes than anything that was asked for."""


@dataclass(frozen=True)
class Response:
    """A whole answer. headers: by name in any case."""

    status: int
    headers: Mapping[str, str]
    content: bytes = field(repr=False)  # asyncio writes the repr of a result, and this may be a large one

    @property
    def retry_after(self) -> float:
        """Seconds of Retry-After; 0 where there is none, or a date."""
        said = self.headers.get("Retry-After", "")
        return float(said) if said.isascii() and said.isdigit() else 0.0


async def exchange(session: aiohttp.ClientSession, method: str, url: str, largest: int, **request: Any) -> Response:
    """One request and its whole answer, of at most `largest` bytes. Raises `TooLarge` and aiohttp.ClientError.

    Redirects are not followed: a token or a key in the headers would go along. request: see `ClientSession.request`.
    """
    if any(c <= " " or c == "\x7f" for c in url):
        raise aiohttp.ClientError(f"an address has no blanks or control characters, got {url!r}")
    async with session.request(method, url, allow_redirects=False, **request) as response:
        if (response.content_length or 0) > largest:
            raise TooLarge(f"an answer of {response.content_length} bytes, more than {largest}")
        content = bytearray()
        async for part in response.content.iter_any():
            content += part
            if len(content) > largest:
                raise TooLarge(f"an answer of more than {largest} bytes")
        return Response(response.status, response.headers, bytes(content))


def ask(
    url: str, method: str, headers: Mapping[str, str], body: bytes | None, seconds: float, largest: int
) -> Response:
    """One `exchange` over a connection of its own, without a proxy, for callers that have no event loop.

    seconds: for all of it, however slowly bytes come. https is verified against the system's certificates, or those
    that SSL_CERT_FILE names. Raises OSError, of which TimeoutError where the whole answer is not there in time and
    SSLCertVerificationError for a certificate; and aiohttp.ClientError, of which `TooLarge`.
    """
    asking = _ask(url, method, headers, body, seconds, largest)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(asking)
    with ThreadPoolExecutor(1) as pool:  # a notebook's thread runs a loop already
        return pool.submit(asyncio.run, asking).result()


async def _ask(
    url: str, method: str, headers: Mapping[str, str], body: bytes | None, seconds: float, largest: int
) -> Response:
    # The context of now: aiohttp's own is made when it is imported, and SSL_CERT_FILE may be set later.
    verified = ssl.create_default_context() if url.startswith("https:") else True
    # aiohttp takes no time for no limit.
    limit = aiohttp.ClientTimeout(total=max(seconds, 1e-3), sock_connect=CONNECT)
    sent = {"Accept-Encoding": "identity", **headers}
    if body is not None:
        sent = {"Content-Type": "application/octet-stream", **sent}
    try:
        connector = aiohttp.TCPConnector(ssl=verified)
        async with aiohttp.ClientSession(connector=connector, timeout=limit, auto_decompress=False) as session:
            data = None if body is None else io.BytesIO(body)
            return await exchange(session, method, url, largest, headers=sent, data=data)
    except aiohttp.ServerTimeoutError as error:  # of the connection, not of the answer
        raise ConnectionError(f"no connection within {CONNECT:.0f} s") from error
    except asyncio.TimeoutError as error:
        raise TimeoutError(f"no whole answer within {seconds:.0f} s") from error
    except aiohttp.ClientConnectorCertificateError as error:
        raise error.certificate_error from error
    except aiohttp.ClientConnectorError as error:
        found = error.os_error
        if isinstance(found, ConnectionError):  # asyncio has words of its own for it
            found = OSError(found.errno, os.strerror(found.errno or 0))
        raise found from error
