"""The HTTP around a `Service`: access, limits, and an end that loses no request.

POST /score and /evaluate take and return safetensors bodies; GET /health says ready (200) or draining (503). One thread
computes, the others wait for it, at most `ServerLimits.waiting` of them. SIGTERM drains: no new work is taken, what has
arrived is finished, and the process ends with code 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from flowbp_ray.rewards.remote import codec, token
from flowbp_ray.rewards.remote.service import RequestRefused, Service
from flowbp_ray.rewards.remote.wire import DIGEST
from flowbp_ray.utils.secrets import HidingFormatter, hidden

BODY, SLOWEST = 30.0, 1 << 20  # seconds for a whole body, and one more for each so many bytes of the largest
ANSWERS = 30.0  # seconds for which a server that has done its work waits until its answers have been read
LINGER = 1.0  # seconds for which a draining server still answers, so that a load balancer sees it
DISCARD = 5.0  # seconds for which the rest of a refused body is read, so that the sender reads the answer

ENDING = "this server is shutting down"
LOGGING: dict[str, Any] = {  # uvicorn's own formatter hides nothing
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"hiding": {"()": HidingFormatter, "fmt": "%(levelname)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "hiding"}},
    "loggers": {"uvicorn": {"handlers": ["stderr"], "level": "WARNING", "propagate": False}},
}

log = logging.getLogger(__name__)


class RequestHandler:
    """Answers requests that have the token and an allowed size, one after the other, while there is room to wait."""

    def __init__(self, service: Service, secret: str) -> None:
        self.service, self.secret = service, secret
        self.ending = asyncio.Event()
        self.patience = BODY + service.limits.nbytes / SLOWEST
        self.inside = 0  # requests from their first byte to their answer
        self.turn = asyncio.Semaphore(1)
        threads = service.config.rewards.threads
        self.worker = ThreadPoolExecutor(1, "scorer", torch.set_num_threads, (threads,))

    @property
    def draining(self) -> bool:
        return self.ending.is_set()

    async def health(self, request: Request) -> Response:
        """Ready or draining; to those with the token also what is scored and how much at once."""
        header = request.headers.get("authorization")
        if header is not None and not token.allowed(header, self.secret):
            return _error(401, "this is not the token")
        about = {} if header is None else self.service.about() | {"inside": self.inside}
        state = {"status": "draining" if self.draining else "ready", "version": codec.VERSION}
        return JSONResponse(state | about, 503 if self.draining else 200)

    async def work(self, request: Request, answer: Callable[[bytes], bytes]) -> Response:
        """`answer` of the request's body, when it is its turn."""
        refusal = self._refusal(request)
        if refusal is not None:
            await self._discard(request)
            return refusal
        self.inside += 1
        try:
            body = await self._body(request)
            async with self.turn:
                if await request.is_disconnected():
                    return _error(400, "nobody waits for the answer")
                done = await asyncio.get_running_loop().run_in_executor(self.worker, answer, body)
            return Response(done, media_type="application/octet-stream")
        except RequestRefused as error:
            return _error(error.status, str(error), retry_after=1 if error.status == 503 else None)
        except Exception as error:  # of a reward or the decoder: the client issues the item again
            log.exception("a request failed")
            return _broken(error)
        finally:
            self.inside -= 1

    def _refusal(self, request: Request) -> Response | None:
        """The answer to what is not let in, known from the headers alone."""
        limits, length = self.service.limits, request.headers.get("content-length", "0")
        if not token.allowed(request.headers.get("authorization"), self.secret):
            return _error(401, "this needs the header Authorization: Bearer <token>")
        asked, digest = request.headers.get(DIGEST, "none"), self.service.digest
        if asked != digest:
            return _error(
                409, f"the request is for settings {ascii(asked[:16])[1:-1]}, these are {digest}, see /health"
            )
        if not length.isascii() or not length.isdigit() or int(length[:20]) > limits.nbytes:
            return _error(413, _too_large(limits.nbytes))
        if self.draining:
            return _error(503, ENDING, retry_after=1)
        if self.inside > limits.waiting:
            return _error(503, f"{self.inside} requests are waiting already", retry_after=1)
        return None

    async def _body(self, request: Request) -> bytes:
        """The whole body, however it is sent. Raises `RequestRefused` where it is too large or too slow, or we end."""
        reading, told = asyncio.ensure_future(self._read(request)), asyncio.ensure_future(self.ending.wait())
        try:
            await asyncio.wait((reading, told), timeout=self.patience, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                return reading.result()
        finally:
            reading.cancel()
            told.cancel()
        if self.draining:
            raise RequestRefused(503, ENDING)
        raise RequestRefused(408, f"the body did not arrive within {self.patience:.0f} s")

    async def _read(self, request: Request) -> bytes:
        """All parts of a body together."""
        limit, parts, size = self.service.limits.nbytes, [], 0
        stream = request.stream().__aiter__()
        while (part := await _next(stream)) is not None:
            size += len(part)
            if size > limit:
                raise RequestRefused(413, _too_large(limit))
            parts.append(part)
        return b"".join(parts)

    async def _discard(self, request: Request) -> None:
        """Read what was sent anyway, for a while: whoever is still sending would see a broken pipe, not the answer."""
        left, until, stream = self.service.limits.nbytes, time.monotonic() + DISCARD, request.stream().__aiter__()
        with contextlib.suppress(RequestRefused):
            while left > 0 and (seconds := until - time.monotonic()) > 0:
                part = await _next(stream, seconds)
                if part is None:
                    return
                left -= len(part)


async def _next(stream: AsyncIterator[bytes], seconds: float | None = None) -> bytes | None:
    """The next part of a body, None at its end. Raises `RequestRefused` where none comes in `seconds`."""
    try:
        return await asyncio.wait_for(anext(stream, None), seconds)
    except asyncio.TimeoutError as error:
        raise RequestRefused(408, "the body stopped arriving") from error
    except Exception as error:  # the client is gone
        raise RequestRefused(400, "the body broke off") from error


def _too_large(limit: int) -> str:
    return f"a body has at most {limit} bytes here; send fewer rows, or start the server with a larger --max-rows"


def _error(status: int, reason: str, retry_after: int | None = None) -> Response:
    headers = {} if retry_after is None else {"retry-after": str(retry_after)}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse({"error": reason}, status, headers)


def _broken(error: Exception) -> Response:
    return _error(500, f"{type(error).__name__}: {hidden(' '.join(str(error).split()))[:300]}")


def application(handler: RequestHandler) -> FastAPI:
    """The routes. There are no pages that describe them: what the server is, is told to those with the token."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        """No such path, no such method."""
        answer = _error(error.status_code, f"{error.detail}: there are GET /health, POST /score and POST /evaluate")
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        return _broken(error)

    @app.get("/health")
    async def health(request: Request) -> Response:
        return await handler.health(request)

    @app.post("/score")
    async def score(request: Request) -> Response:
        return await handler.work(request, handler.service.score)

    @app.post("/evaluate")
    async def evaluate(request: Request) -> Response:
        return await handler.work(request, handler.service.evaluate)

    return app


class DrainingServer(uvicorn.Server):
    """uvicorn with signals of our own: it would close its socket first, and end with the signal's code."""

    def __init__(self, config: uvicorn.Config, handler: RequestHandler, ready: Callable[[], object]) -> None:
        super().__init__(config)
        self.handler, self.ready = handler, ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The first SIGTERM or Ctrl-C drains; the second ends at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    def _end(self) -> None:
        if self.handler.draining:
            os._exit(1)  # the thread that scores cannot be interrupted in another way
        self.handler.ending.set()
        self._drain = asyncio.get_running_loop().create_task(self._finish())

    async def _finish(self) -> None:
        await asyncio.sleep(LINGER)
        while self.handler.inside:
            await asyncio.sleep(0.02)
        self.should_exit = True


def configured(handler: RequestHandler) -> uvicorn.Config:
    """uvicorn's settings. Without the last one somebody who never reads an answer would hold the end for ever."""
    settings: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False, "http": "h11"}
    settings |= {"loop": "asyncio", "ws": "none", "lifespan": "off", "timeout_graceful_shutdown": ANSWERS}
    settings["log_config"] = LOGGING
    return uvicorn.Config(application(handler), **settings)


def serve(service: Service, secret: str, listening: socket.socket, ready: Callable[[], object]) -> None:
    """Answer at a bound socket until SIGTERM or Ctrl-C. ready: called once requests are answered."""
    handler = RequestHandler(service, secret)
    DrainingServer(configured(handler), handler, ready).run([listening])
    handler.worker.shutdown()
