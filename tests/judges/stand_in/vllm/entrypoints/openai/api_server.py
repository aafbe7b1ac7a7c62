"""Stands in for vLLM's module of this name: the same arguments, answers without a model, in a process of its own.

The environment says how it misbehaves. STAND_IN_BEFORE: code that runs before the port is opened. STAND_IN_SICK: while
this file is there, every answer is a 503. VLLM_API_KEY: the API key that it wants for all but /health.
GET /leave ends it, with code 0.
"""

from __future__ import annotations

import http.server
import json
import os
import sys
import threading
from typing import Any


def argument(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._say({"data": [{"id": argument("--served-model-name")}]} if self.path == "/v1/models" else {})
        if self.path == "/leave":
            threading.Timer(0.05, os._exit, [0]).start()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["model"] != argument("--served-model-name"):
            return self._say({"error": "no such model"}, 404)
        print(f'"POST {self.path} HTTP/1.1" 200', flush=True)
        self._say({"choices": [{"message": {"content": "Final Score: 4"}, "finish_reason": "stop"}]})

    def _say(self, answer: Any, status: int = 200) -> None:
        wanted = os.environ.get("VLLM_API_KEY")
        if wanted and self.path != "/health" and self.headers["Authorization"] != f"Bearer {wanted}":
            status = 401
        if os.path.exists(os.environ.get("STAND_IN_SICK", "")):
            status = 503
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        pass


print("serving", argument("--model"), flush=True)
exec(os.environ.get("STAND_IN_BEFORE", ""))
http.server.ThreadingHTTPServer(("127.0.0.1", int(argument("--port"))), Handler).serve_forever()
