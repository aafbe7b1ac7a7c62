"""A state is written by a thread from a copy: as it was at the call, whatever the engine has done since."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowbp_ray.learning import saver as module
from flowbp_ray.learning.engine import TorchEngine
from flowbp_ray.learning.saver import StateSaver
from flowbp_ray.run.engine_state import Fragment
from flowbp_ray.utils.background import free_memory
from tests.learning.elsewhere import config, network, stepped


class Late(TorchEngine):
    """Plain torch, whose files are not begun before `gate` is set."""

    gate: threading.Event

    def save(self, folder: Path, own: Iterable[Fragment] | None = None) -> dict[str, str]:
        assert self.gate.wait(60)
        return super().save(folder, own)


def late(dtype: torch.dtype) -> Late:
    engine = Late(network(dtype), config(engine="torch"))
    engine.gate = threading.Event()
    stepped(engine, 1)
    return engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_the_state_of_the_call(tmp_path: Path, dtype: torch.dtype) -> None:
    """Masters, moments, average and counters, byte for byte those of a rank that waits."""
    engine, saver = late(dtype), None
    engine.gate.set()
    at_once = engine.save(tmp_path / "at once")
    engine.gate.clear()
    saver = StateSaver(engine, 1)
    saver.begin(tmp_path / "later", background=True)
    for seed in (2, 3):
        assert saver.saved(wait=False) is None
        stepped(engine, seed)
    engine.gate.set()
    assert saver.saved(wait=True) == at_once == saver.saved(wait=False)
    for name in at_once:
        assert (tmp_path / "at once" / name).read_bytes() == (tmp_path / "later" / name).read_bytes()
    held = load_file(tmp_path / "later" / "engine" / "rank_0000.safetensors")
    now = {f"{kind}/{f.name}": tensor for f in engine.fragments() for kind, tensor in f.tensors.items()}
    assert all(torch.equal(now[name], held[name]) is False for name in held if "weight" in name)


def test_without_room_in_memory_it_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = late(torch.float32)
    engine.gate.set()
    monkeypatch.setattr(module, "free_memory", lambda: 1000)
    saver = StateSaver(engine, 1)
    saver.begin(tmp_path / "a", background=True)
    assert saver.saved(wait=False) == engine.save(tmp_path / "b")


def test_what_goes_wrong_is_raised_where_the_result_is_asked_for(tmp_path: Path) -> None:
    engine = late(torch.float32)
    engine.gate.set()
    (tmp_path / "a file").write_text("")
    saver = StateSaver(engine, 1)
    saver.begin(tmp_path / "a file", background=True)
    with pytest.raises(NotADirectoryError):
        saver.saved(wait=True)
    with pytest.raises(NotADirectoryError):
        saver.begin(tmp_path / "a file", background=False)


def test_free_memory_of_a_container(tmp_path: Path) -> None:
    """Its limit less what it uses, of which the kernel gives the cache back; and never more than the machine has."""
    machine = free_memory(tmp_path / "no container")
    assert machine > 0
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 250\nactive_file 50\n")
    assert free_memory(tmp_path) == 1000 - 700 + 250
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) > 10**6
