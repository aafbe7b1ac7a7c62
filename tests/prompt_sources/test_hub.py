"""Datasets of the Hub, by the real client against a stand-in of the Hub's HTTP API."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flowbp_ray.prompt_sources import hub
from tests.paths import DATA, ROOT

SHA = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "README.md": b"# A card, which is no prompt\n",
    "data/train-00000-of-00002.jsonl": b'{"prompt": "a cat"}\n',
    "data/train-00001-of-00002.jsonl": b'{"prompt": "a dog"}\n',
    "data/test.jsonl": b'{"prompt": "a bird"}\n',
    "pictures.zip": b"PK not fetched",
    "data/objects.json": b'{"beside": "other kinds"}',
    "data/more.json.gz": b"packed, beside other kinds",
} | {f"saved/{p.name}": p.read_bytes() for p in sorted((DATA / "prompts" / "saved").iterdir())}
LISTS = {"README.md": b"# A card", "config.json": b"{}", "captions.json": b'["a cat", "a dog"]'}
PACKED = {"README.md": b"# A card", "captions.json.gz": gzip.compress(b'["a fish"]')}
DATASETS = {"me/cats": FILES, "me/lists": LISTS, "me/packed": PACKED}


class Answers(BaseHTTPRequestHandler):
    """repo_info, the tree, and the files of DATASETS. asked: the files that were fetched."""

    asked: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name = "/".join(path.removeprefix("/api").split("/")[2:4])
        files = DATASETS.get(name, {})
        if files and path in (f"/api/datasets/{name}/revision/{revision}" for revision in ("main", "v1", SHA)):
            siblings = [{"rfilename": file} for file in files]
            return self.answer(200, json.dumps({"id": name, "sha": SHA, "siblings": siblings}).encode())
        if files and path == f"/api/datasets/{name}/tree/{SHA}":
            tree = [{"type": "file", "path": n, "size": len(raw), "oid": hashlib.sha1(raw).hexdigest()}
                    for n, raw in files.items()]  # fmt: skip
            return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        file = path.removeprefix(f"/datasets/{name}/resolve/{SHA}/")
        if file in files:
            self.asked.append(file)
            etag = f'"{hashlib.sha1(files[file]).hexdigest()}"'
            return self.answer(200, files[file], ETag=etag, X_Repo_Commit=SHA)
        code = "RevisionNotFound" if "/me/cats/" in path else "RepoNotFound"
        self.answer(404, b"{}", X_Error_Code=code, X_Error_Message="not there")


@pytest.fixture(scope="module")
def stand_in() -> Iterator[str]:
    Answers.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


PROGRAM = """
import json, sys
from flowbp_ray.prompt_files import Reading, load
for source, columns, split in json.loads(sys.argv[1]):
    try:
        print(json.dumps([r.text for r in load(source, "data.prompts", Reading("data", columns, split))]))
    except ValueError as error:
        print(json.dumps(str(error)))
"""


def loaded(cache: Path, endpoint: str, *sources: tuple[str, dict[str, str], str | None], **settings: str) -> list:
    """What each source holds, or its refusal, in a process of its own: the client reads its variables when imported."""
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "PYTHONPATH": str(ROOT)} | settings
    ran = subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(sources)], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def test_a_dataset_of_the_hub_is_fetched_and_read(tmp_path: Path, stand_in: str) -> None:
    cats, captions = "hf://datasets/me/cats", {"prompt": "caption"}
    whole, below, one, pattern, saved, missing, nobody = loaded(
        tmp_path,
        stand_in,
        (f"{cats}@v1/data", {}, "train"),
        (f"{cats}/data", {}, None),
        (f"{cats}/data/test.jsonl", {}, None),
        (f"{cats}@{SHA}/data/train-*", {}, None),
        (f"{cats}/saved", captions, None),
        (f"{cats}@v9", {}, None),
        ("hf://datasets/nobody/none", {}, None),
    )
    assert (whole, one, pattern) == (["a cat", "a dog"], ["a bird"], ["a cat", "a dog"])
    assert "has the splits test, train; write data.split=" in below
    assert saved == ["a red circle", "two blue squares", "a green star", "a red circle"]
    for refused, name in ((missing, "me/cats@v9"), (nobody, "nobody/none")):
        assert "\n" not in refused and f"data.prompts: prompts hf://datasets/{name} cannot be fetched" in refused
        assert "HF_TOKEN" in refused and len(refused) < 500
    assert {"README.md", "pictures.zip"}.isdisjoint(Answers.asked)
    names = ("hf://datasets/me/lists", "hf://datasets/me/packed")
    captions, packed = loaded(tmp_path, stand_in, *((name, {}, None) for name in names))
    assert packed == ["a fish"] and captions == ["a cat", "a dog"] and "captions.json" in Answers.asked
    fetched = len(Answers.asked)
    offline = loaded(tmp_path, stand_in, (f"{cats}/data", {}, "test"), (f"{cats}2", {}, None), HF_HUB_OFFLINE="1")
    assert offline[0] == ["a bird"] and "cannot be fetched" in offline[1] and len(Answers.asked) == fetched


@pytest.mark.parametrize(
    "source", ["hf://me/cats", "hf://datasets/me", "hf://models/me/cats", "hf://datasets/me/cats@"]
)
def test_another_address_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match="is no dataset of the Hub; write hf://datasets/OWNER/NAME"):
        hub.fetched(source, (".txt",), f"data.prompts: prompts {source}")
