"""https to a real reward server behind a proxy that has a certificate, as docs/remote-rewards.md advises."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from flowbp_ray.messages import unpack
from flowbp_ray.rewards.remote import handshake
from flowbp_ray.rewards.remote.client import RemoteScorer, Unavailable
from tests.rewards.remote.servers import BOTH, PROMPTS, Server, asking, bits, item, report, target
from tests.small import scorer_of, small_config


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed one for localhost, and its key, by openssl."""
    folder = tmp_path_factory.mktemp("certificate")
    file, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(file)]
    subprocess.run(command, check=True, capture_output=True)
    return file, key


@contextmanager
def behind(server: Server, certificate: tuple[Path, Path]) -> Iterator[int]:
    """The port of a proxy that takes off TLS and passes bytes on, both ways; a connection is one exchange."""
    context, where = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), urlsplit(server.url)
    context.load_cert_chain(*certificate)
    ended = threading.Event()

    def copy(source: socket.socket, goal: socket.socket) -> None:
        with suppress(OSError):
            while part := source.recv(1 << 16):
                goal.sendall(part)

    def serve() -> None:
        while not ended.is_set():
            with (
                suppress(OSError),
                context.wrap_socket(listening.accept()[0], server_side=True) as client,
                socket.create_connection((where.hostname or "", where.port or 0)) as upstream,
            ):
                threading.Thread(target=copy, args=(upstream, client), daemon=True).start()
                copy(client, upstream)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.1)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            ended.set()
            thread.join()


def test_a_certificate_is_verified(
    server: Server, certificate: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Self-signed: refused by the check and by the client. Named by SSL_CERT_FILE: taken, for its own host only."""
    with behind(server, certificate) as port:
        url, elsewhere = f"https://localhost:{port}", f"https://127.0.0.1:{port}"
        config = asking(tmp_path, url, "evaluation.batch=4", "cluster.stall_timeout=2")
        arguments = (item(), PROMPTS[:2], report(), target())
        with pytest.raises(ValueError, match=r"is not trusted here \(self.signed certificate\); set SSL_CERT_FILE"):
            handshake.check(config)
        with pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"):
            RemoteScorer(config, {url: server.digest}).score(*arguments)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        with pytest.raises(ValueError, match=r"is not trusted here \(IP address mismatch"):
            handshake.check(asking(tmp_path, elsewhere))
        config = asking(tmp_path, url, "evaluation.batch=4")
        _, pulled = RemoteScorer(config, handshake.check(config)).score(*arguments)
    _, expected = scorer_of(small_config(tmp_path, "flowbp_sparse", BOTH)).score(*arguments)
    assert bits(unpack(pulled)) == bits(unpack(expected))
