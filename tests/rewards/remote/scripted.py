"""A server on a real socket that answers by a script, where a real reward server would not."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar


class Scripted(BaseHTTPRequestHandler):
    """Answers POSTs with one (status, headers, content) after the other, the last one for ever; None hangs up."""

    script: ClassVar[list[tuple[int, dict[str, str], bytes] | None]] = []
    asked = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        answer = self.script[min(Scripted.asked, len(self.script) - 1)]
        Scripted.asked += 1
        if answer is None:
            self.close_connection = True
            return
        status, headers, content = answer
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""
