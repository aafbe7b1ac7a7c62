"""A small HTTP server that answers like an OpenAI-compatible one, or misbehaves as a test says. Real sockets."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image


def said(text: str) -> dict[str, Any]:
    """An answer of that text."""
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}


def picture_of(body: dict[str, Any]) -> np.ndarray:
    """The picture in a request, decoded by PIL; asserts that it is a PNG."""
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    kind, _, data = url.partition(";base64,")
    assert kind == "data:image/png", kind
    raw = base64.b64decode(data)
    assert raw.startswith(b"\x89PNG\r\n")
    return np.asarray(Image.open(io.BytesIO(raw)))


@dataclass
class Fake:
    """answer: (body, how many requests came before it) -> a status, and an object or raw bytes.

    tokens: what /tokenize says, instead of ids of three words. models: the status of every GET. location: where an
    answer of 3xx sends.
    """

    answer: Callable[[dict[str, Any], int], tuple[int, Any]]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    tokens: Any = None
    location: str | None = None
    models: int = 200
    gets: list[dict[str, str]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0

    def __enter__(self) -> Fake:
        fake, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                fake.gets.append(dict(self.headers))
                self._say(fake.models, {"data": [{"id": "the-model"}]} if self.path == "/v1/models" else {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/tokenize":
                    words = {"Yes": [7], "No": [9], "Maybe so": [3, 4]}
                    return self._say(200, {"tokens": fake.tokens or words[body["prompt"]]})
                assert self.path == "/v1/chat/completions", self.path
                with lock:
                    before = len(fake.bodies)
                    fake.bodies.append(body)
                    fake.headers.append(dict(self.headers))
                    fake.times.append(time.monotonic())
                    fake.at_once += 1
                    fake.most_at_once = max(fake.most_at_once, fake.at_once)
                try:
                    status, answer = fake.answer(body, before)
                finally:
                    with lock:
                        fake.at_once -= 1
                self._say(status, answer)

            def _say(self, status: int, answer: Any) -> None:
                raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(raw)))
                    if 300 <= status < 400:
                        self.send_header("Location", f"{fake.location}{self.path}")
                    self.end_headers()
                    self.wfile.write(raw)
                except OSError:  # the client gave up on us, as a test wants it
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: object) -> None:
                """The client hung up: an answer that is too long, say."""

        self.server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
