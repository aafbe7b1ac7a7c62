"""Real `flowbp-ray serve-reward` processes, and items to send to them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.messages import Item, Packed, RolloutReport, Version, pack
from flowbp_ray.rewards.remote.wire import DIGEST
from flowbp_ray.utils.addresses import bearer
from flowbp_ray.utils.http import ask
from tests.paths import ROOT
from tests.small import small_config, small_overrides

TOKEN = "a-token-of-the-tests-0123456789"
PROMPTS = ["a red cross and a green circle", "an orange cross", "two yellow circles", "a photo of a square and a star"]
BOTH = "rewards.monitors=[shapes_clip_heldout]"
LATENT = (8, 8, 8)


@dataclass(frozen=True)
class Server:
    """A running process and where it answers."""

    process: subprocess.Popen[str]
    url: str

    def ask(
        self, method: str, path: str, body: bytes | None = None, token: str | None = TOKEN, digest: str | None = None
    ) -> tuple[int, float, bytes]:
        """digest: of the settings that are wanted; None: those that the server has."""
        headers = bearer(token) | ({} if body is None else {DIGEST: digest or self.digest})
        answer = ask(self.url + path, method, headers, body, 120.0, 1 << 26)
        return answer.status, answer.retry_after, answer.content

    @cached_property
    def digest(self) -> str:
        return str(json.loads(self.ask("GET", "/health")[2])["digest"])

    @property
    def headers(self) -> dict[str, str]:
        """Of a request that is let in."""
        return bearer(TOKEN) | {DIGEST: self.digest}


@contextlib.contextmanager
def serving(folder: Path, *overrides: str, options: tuple[str, ...] = ()) -> Iterator[Server]:
    """`flowbp-ray serve-reward` of the small configuration, at a free port; killed at the end if it still runs."""
    secret = token_file(folder)
    command = [sys.executable, "-m", "flowbp_ray", "serve-reward", "shapes_flowbp_sparse", *small_overrides(folder)]
    command += [*overrides, "--port", "0", "--token-file", str(secret), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    errors = (folder / "stderr.txt").open("w")
    with (
        errors,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert " at http://127.0.0.1:" in line, (line, (folder / "stderr.txt").read_text())
            yield Server(process, line.split()[-1])
        finally:
            if process.poll() is None:
                process.kill()


def token_file(folder: Path) -> Path:
    """A file with the servers' token."""
    path = folder / "token"
    path.write_text(TOKEN + "\n")
    return path


def asking(folder: Path, url: str | list[str], *overrides: str) -> RunConfig:
    """The small configuration of a run whose rewards are computed at `url`."""
    urls = [url] if isinstance(url, str) else url
    remote = [f"rewards.url=[{','.join(urls)}]", f"rewards.token_file={token_file(folder)}"]
    return small_config(folder, "flowbp_sparse", BOTH, *remote, *overrides)


def item(samples: tuple[int, ...] = (0, 1), step: int = 3) -> Item:
    """A training item as a scorer needs it: without plans."""
    return Item("train", step, 1, samples, samples, (), 42, 6, 1.0, Version(0, step))


def report(omega: tuple[float, ...] = (0.7, 1.3), kept: tuple[bool, ...] = (True, True)) -> RolloutReport:
    """The report of its rollout."""
    return RolloutReport(3, 1, Version(0, 3), omega, (), kept, 0, 0, 0, 0, 0, 0.0, 0.0)


def target(rows: int = 2, branches: int | None = 1, dtype: torch.dtype = torch.float32) -> Packed:
    """Latents of the size that the sampler sends, always the same; branches None: those of an evaluation."""
    shape: tuple[int, ...] = (rows, *LATENT) if branches is None else (rows, branches, *LATENT)
    return pack(torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype))


def bits(values: Any) -> bytes:
    """The bytes of a tensor or of nested floats, so that NaN equals NaN and 0 is not -0."""
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float64)
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
