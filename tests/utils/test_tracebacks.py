"""What a process prints of exceptions that nobody catches holds no secret: real processes, and what they print."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

VALUE = "a1b2c3d4e5f6-not-to-be-seen"
SIGNED = "https://cdn.host/file?Signature=c2VjcmV0LW9mLWNkbg&a=1"

FAILS = f"""
import asyncio, logging, os, threading
KEY = os.environ["WANDB_API_KEY"]
ADDRESS = "{SIGNED}"

def fails(*where):
    try:
        raise KeyError(f"within {{KEY}}")
    except KeyError as error:
        raise TypeError(f"{{where}}: no answer with {{KEY}} at {{ADDRESS}}") from error

class Ends:
    def __del__(self):
        fails("an object's end")

def in_a_thread():
    t = threading.Thread(target=fails, args=("a thread",))
    t.start()
    t.join()

async def forgotten():
    task = asyncio.ensure_future(asyncio.to_thread(fails, "a task"))
    await asyncio.sleep(0.3)
    del task

async def asks():
    import aiohttp
    async with aiohttp.ClientSession(headers={{"Authorization": f"Bearer {{KEY}}"}}) as session:
        await session.get(f"http://127.0.0.1:9/x?token={{KEY}}")

def requested(port):
    import requests
    requests.get(f"http://127.0.0.1:{{port}}/x?token={{KEY}}")

def all_ways():
    in_a_thread()
    Ends()
    asyncio.run(forgotten())
    log = logging.getLogger("a.library")
    log.warning("retrying %s", ADDRESS + KEY)
    try:
        fails("a log")
    except TypeError:
        log.exception("failed")
    for call in (lambda: asyncio.run(asks()), lambda: requested(9)):
        t = threading.Thread(target=call)
        t.start()
        t.join()
    fails("the main thread")
"""
WAYS = ("a thread", "an object's end", "a task", "a log", "the main thread")

COMMAND = """
import typer
from flowbp_ray.utils.console import guarded
app = typer.Typer()  # which would print local variables

@app.command()
def main() -> None:
    key = KEY
    import ray  # which sets a hook of its own
    {call}

guarded(app)
"""
ACTOR = """
from flowbp_ray.utils.tracebacks import hide_in_tracebacks
hide_in_tracebacks()
{call}
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    file = folder / "process.py"
    file.write_text(code)
    env = {**os.environ, "WANDB_API_KEY": VALUE, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, str(file)], capture_output=True, text=True, env=env, timeout=200)


@pytest.mark.parametrize("frame", [COMMAND, ACTOR], ids=["command", "actor"])
def test_no_secret_is_printed(frame: str, tmp_path: Path) -> None:
    done = run(FAILS + frame.format(call="all_ways()"), tmp_path)
    said = done.stdout + done.stderr
    assert VALUE not in said and "c2VjcmV0" not in said, said
    for way in WAYS:
        assert f"{(way,)}: no answer with *** at https://cdn.host/file?***&a=1" in said, (way, said)
    assert "retrying https://cdn.host/file?***&a=1***" in said and "\nTypeError" in said
    assert "KeyError: 'within ***'" in said and "Traceback (most recent call last):" in said
    assert "ClientConnectorError" in said and "url: /x?***" in said  # of requests, in another thread
    assert done.returncode == 1


def test_an_expected_error_of_a_library_is_a_line(tmp_path: Path) -> None:
    done = run(FAILS + COMMAND.format(call="requested(9)"), tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("flowbp-ray: ") and done.stderr.count("\n") == 1
    assert VALUE not in done.stderr and "url: /x?***" in done.stderr


def test_without_it_the_same_process_shows_them(tmp_path: Path) -> None:
    """That the tests above would see them."""
    done = run(FAILS + "all_ways()", tmp_path)
    assert done.stderr.count(VALUE) > 9 and "c2VjcmV0" in done.stderr and done.returncode == 1


LOGS = """
import logging, os, warnings
from diffusers.utils import logging as of_diffusers
from huggingface_hub.utils import logging as of_the_hub
from transformers.utils import logging as of_transformers
{first}
KEY = os.environ["WANDB_API_KEY"]
warnings.warn("a warning with " + KEY)
for library, name in ((of_diffusers, "diffusers"), (of_the_hub, "huggingface_hub"), (of_transformers, "transformers")):
    assert library.get_logger(name).handlers
    library.get_logger(name + ".x").error("%s with %s", name, KEY)
own = logging.getLogger("with.a.handler")
own.addHandler(logging.StreamHandler())
own.handlers[0].setFormatter(logging.Formatter("own: %(message)s"))
own.error("a line with " + KEY)
own.error("no place for %d", KEY)

class Fails:
    def __repr__(self):
        raise TypeError(KEY)

own.error("%s", Fails())
"""
HIDES = "from flowbp_ray.utils.tracebacks import hide_in_tracebacks\nhide_in_tracebacks()\n"


@pytest.mark.parametrize("when", ["before", "after", "never"])
def test_warnings_and_the_handlers_of_libraries_hold_no_secret(when: str, tmp_path: Path) -> None:
    """Whether the libraries were imported before or after; without it all of them show it."""
    said = run((HIDES if when == "before" else "") + LOGS.format(first=HIDES if when == "after" else ""), tmp_path)
    assert said.returncode == 0, said.stderr
    shown = VALUE if when == "never" else "***"
    for what in ("a warning", "diffusers", "huggingface_hub", "transformers", "own: a line"):
        assert f"{what} with {shown}" in said.stderr, (what, said.stderr)
    assert said.stderr.count("--- Logging error ---") == 2 and f"Arguments: ('{shown}',)" in said.stderr
    assert f"TypeError: {shown}" in said.stderr and (when == "never") == (VALUE in said.stderr)


@pytest.mark.parametrize(
    ("hook", "stays"),
    [
        ("import sys", False),
        ("import ray, sys", False),
        ("import sys\nsys.excepthook = lambda *_: None", True),
        ("import sys, rich.traceback\nrich.traceback.install()", True),
    ],
)
def test_only_hooks_that_print_in_full_are_replaced(hook: str, stays: bool, tmp_path: Path) -> None:
    code = f"{hook}\nbefore = sys.excepthook\n{HIDES}assert (sys.excepthook is before) == {stays}"
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_hook_of_a_test_runner_stays(tmp_path: Path) -> None:
    code = """
import threading
from flowbp_ray.utils.tracebacks import hide_in_tracebacks
seen = []
threading.excepthook = seen.append
hide_in_tracebacks()
t = threading.Thread(target=lambda: 1 / 0)
t.start()
t.join()
assert len(seen) == 1
"""
    assert run(code, tmp_path).returncode == 0
