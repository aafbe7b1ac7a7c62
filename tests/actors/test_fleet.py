"""What a fleet says of itself."""

from __future__ import annotations

from actors.fleet import counted


def test_hosts_of_a_role_in_one_line() -> None:
    assert counted(["b", "a", "b"]) == "b (2), a" and counted(["a"]) == "a"
