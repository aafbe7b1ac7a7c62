"""A stand-in for the Hub's HTTP API: repositories are made, large files come by git-lfs, the rest with the commit."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = (".safetensors", ".png")


class Hub(ThreadingHTTPServer):
    """What it was asked: `made` the bodies of repos/create, `files` by repository and path, `tokens` in its headers.

    refusal: an HTTP status and a message that every request to make a repository is answered with.
    """

    def __init__(self, refusal: tuple[int, str] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.refusal = refusal
        self.made: list[dict[str, Any]] = []
        self.stored: dict[str, bytes] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_PUT(self) -> None:
        self.server.stored[self.path.removeprefix("/store/")] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        hub, body = self.server, self.body()
        hub.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            if hub.refusal:
                status, message = hub.refusal
                return self.answer({"error": message}, status, {"X-Error-Message": message})
            asked = json.loads(body)
            hub.made.append(asked)
            return self.answer({"url": f"{hub.address}/{asked['organization'] or 'someone'}/{asked['name']}"})
        if self.path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return self.answer({"errors": [], "warnings": []})
        if asked := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if path.endswith(LARGE) else "regular" for path in files]
            made = [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in zip(files, modes, strict=True)]
            return self.answer({"files": made})
        if self.path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{**o, "actions": {"upload": {"href": f"{hub.address}/store/{o['oid']}"}}} for o in objects]
            return self.answer({"transfer": "basic", "objects": actions})
        if asked := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            self.commit(asked[1], [json.loads(line) for line in body.splitlines() if line])
            return self.answer({"commitUrl": f"{hub.address}/{asked[1]}/commit/{'0' * 40}", "commitOid": "0" * 40})
        self.answer({"error": self.path}, 404)

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.files.setdefault(repo, {})
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]


@contextmanager
def running(refusal: tuple[int, str] | None = None) -> Iterator[Hub]:
    hub = Hub(refusal)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
