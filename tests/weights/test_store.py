"""The store that ranks meet in listens at one address, not on all interfaces."""

from __future__ import annotations

import socket
from datetime import timedelta

import psutil
import torch.distributed as dist

from flowbp_ray.weights.group import serve_store


def listening() -> set[tuple[str, int]]:
    """The addresses at which this process accepts connections."""
    found = psutil.Process().net_connections("inet")
    return {(c.laddr.ip, c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN}


def test_it_listens_at_its_address_alone() -> None:
    before = listening()
    store = serve_store("127.0.0.2", 0, 10.0)
    assert listening() - before == {("127.0.0.2", store.port)}
    other = dist.TCPStore("127.0.0.2", store.port, is_master=False, timeout=timedelta(seconds=10))
    other.set("key", "value")
    assert store.get("key") == b"value"
    with socket.socket() as elsewhere:
        assert elsewhere.connect_ex(("127.0.0.1", store.port)) != 0


def test_a_shared_one_is_what_torch_makes_later() -> None:
    """So `init_process_group` opens no second one, which would listen on all interfaces."""
    before = listening()
    first = serve_store("127.0.0.1", 0, 10.0, shared=True)
    second = dist.TCPStore("127.0.0.1", first.port, 1, True, timedelta(seconds=10), multi_tenant=True)
    second.set("key", "value")
    assert first.get("key") == b"value" and listening() - before == {("127.0.0.1", first.port)}
