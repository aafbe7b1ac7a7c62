"""Prompts in .json and in files that gzip packed, against the standard library that writes them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pytest

from flowbp_ray import prompts
from flowbp_ray.preflight import describe_prompts
from flowbp_ray.prompt_files import Reading, load
from flowbp_ray.prompt_sources import text
from flowbp_ray.prompt_sources.readers import OF_TEXT
from tests.paths import DATA
from tests.prompt_sources.test_sources import refused, texts
from tests.small import small_config

ROWS = [{"caption": "a cat", "kind": "Animals"}, {"caption": "a man, old", "kind": "People"}]
CAPTIONS = Reading(columns={"prompt": "caption", "category": "kind"})
WANTED = [("a cat", "Animals"), ("a man, old", "People")]


def written(kind: str, rows: list[dict[str, str]]) -> str:
    """Rows as the standard library writes them."""
    if kind == ".json":
        return json.dumps(rows)
    if kind == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows)
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], delimiter="\t" if kind == ".tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


@pytest.mark.parametrize("kind", sorted(set(OF_TEXT) - {".txt"}))
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_packed_or_not_a_file_reads_the_same(tmp_path: Path, kind: str, mark: str) -> None:
    plain, packed = tmp_path / f"my.v2{kind}", tmp_path / f"my.v2{kind}.gz"
    plain.write_text(mark + written(kind, ROWS), encoding="utf-8")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for file in (plain, packed):
        assert [(r.text, r.skill) for r in load(str(file), "data.prompts", CAPTIONS)] == WANTED
        assert texts(file, Reading(columns=CAPTIONS.columns, where={"category": ["People"]})) == ["a man, old"]
    assert refused(packed).replace(".gz", "") == refused(plain)


def test_packed_lines_and_several_parts(tmp_path: Path) -> None:
    """`cat a.gz b.gz` unpacks to both, and a pattern or a folder names packed files as it does others."""
    for number, words in enumerate((["a cat", "", " a dog"], ["a bird"])):
        (tmp_path / f"{number}.txt.gz").write_bytes(gzip.compress("\r\n".join([*words, ""]).encode()))
    both = ["a cat", "a dog", "a bird"]
    assert texts(tmp_path / "*.txt.gz") == texts(tmp_path) == both
    joined = b"".join(file.read_bytes() for file in sorted(tmp_path.iterdir()))
    (tmp_path / "all.txt.gz").write_bytes(joined)
    assert texts(tmp_path / "all.txt.gz") == both
    assert "has no columns; write data.columns=null" in refused(tmp_path / "all.txt.gz", CAPTIONS)
    (tmp_path / "more.txt").write_text("a fish\n")
    assert "has files .txt and .txt.gz; write a pattern" in refused(tmp_path)


def test_a_list_of_texts_reads_as_lines_do(tmp_path: Path) -> None:
    for indent in (None, 2):
        (tmp_path / "p.json").write_text(json.dumps(["a cat", " ", "a dog\non a boat", "ein Bär"], indent=indent))
        assert texts(tmp_path / "p.json") == ["a cat", "a dog\non a boat", "ein Bär"]
    assert "entry 1 is a text, which has no columns" in refused(tmp_path / "p.json", CAPTIONS)
    assert "'w' (data.weights), only ['prompt']" in refused(tmp_path / "p.json", Reading(weight="w"))
    (tmp_path / "p.json").write_text(json.dumps(["a cat", {"prompt": "a dog", "skill": "x"}]))
    assert [(r.text, r.skill) for r in load(str(tmp_path / "p.json"))] == [("a cat", ""), ("a dog", "x")]


def test_datasets_to_json_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    """The library writes an object a line by default, and a list on request."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    datasets.disable_progress_bars()
    saved = datasets.load_from_disk(str(DATA / "prompts" / "saved")).select_columns(["caption", "kind"])
    for name, how in (("lines.json", {}), ("list.json", {"lines": False}), ("packed.json.gz", {"compression": "gzip"})):
        saved.to_json(str(tmp_path / name), **how)
        assert texts(tmp_path / name, CAPTIONS) == saved["caption"][:]


def test_lines_called_json(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text("\n" + written(".jsonl", ROWS))
    assert texts(file, CAPTIONS) == [row["caption"] for row in ROWS]
    file.write_text(written(".jsonl", ROWS[:1]))
    assert texts(file, CAPTIONS) == ["a cat"]
    file.write_text(written(".jsonl", ROWS) + '{"caption": "a d\n')
    assert "p.json, line 3 is not JSON" in refused(file, CAPTIONS)


COCO = {"info": {"year": 2017}, "images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a cat"}]}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (json.dumps(COCO), ["an object with ['annotations', 'images', 'info']", "under 'annotations' alone"]),
        (json.dumps(COCO, indent=1), ["under 'annotations' alone"]),
        (json.dumps({"data": ["a cat"]}), ["under 'data' alone"]),
        (json.dumps({"prompt": {"0": "a cat"}}), ["an object with ['prompt']; write a list such as"]),
        (json.dumps("a cat"), ["holds 'a cat'; write a list such as"]),
        ("[1]", ["entry 1 holds 1; write a text, or an object"]),
        ('["a cat", null]', ["entry 2 holds None; write"]),
        ('[{"prompt": "a", "prompt": "b"}]', ["key 'prompt' is there twice in {'prompt': 'b'}"]),
        ('[{"prompt": "a cat"', ["is not JSON (", "write a list"]),
        ("[" * 100_000, ["is not JSON (", "write a list"]),
        ("a cat\na dog\n", ["is not JSON (", "write a list"]),
        ('[{"text": "a cat"}]', ["entry 1: no text under 'prompt'", "data.columns={prompt: text}"]),
        ("[]", ["holds no prompt"]),
        ("", ["holds no prompt"]),
    ],
)
def test_what_is_no_list_of_prompts_is_refused(tmp_path: Path, raw: str, words: list[str]) -> None:
    (tmp_path / "p.json").write_text(raw)
    message = refused(tmp_path / "p.json")
    assert "data.prompts: prompts file" in message and "p.json" in message, message
    assert all(word in message for word in words), message


ONE = {"prompt": "a cat", "skill": "color", "tags": ["red", "cat"], "size": {"w": 1}}


@pytest.mark.parametrize("name", ["p.json", "p.json.gz"])
@pytest.mark.parametrize("indent", [None, 1])
def test_one_object_reads_alike_on_one_line_and_on_many(tmp_path: Path, name: str, indent: int | None) -> None:
    file = tmp_path / name

    def write(found: object) -> Path:
        raw = json.dumps(found, indent=indent).encode() + b"\n"
        file.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        return file

    [record] = load(str(write(ONE)))
    assert (record.text, record.skill, record.extra["tags"]) == ("a cat", "color", ["red", "cat"])
    assert texts(write(ROWS[0]), CAPTIONS) == ["a cat"]
    for found, words in (
        (ONE | {"boxes": [{"x": 1}]}, 'write a list such as [{"prompt": "a cat"}]: that under \'boxes\' alone'),
        (
            {"caption": "a cat", "tags": ["red"]},
            "entry 1: no text under 'prompt', only ['caption', 'tags']; write",
        ),
        ({"year": 2017}, "entry 1: no text under 'prompt', only ['year']; write"),
        ({"tags": ["a cat", "a dog"]}, "that under 'tags' alone"),
        ({"prompt": ["a cat", "a dog"]}, "that under 'prompt' alone"),
    ):
        assert words in refused(write(found)), found


def test_json_beside_other_files_describes_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps([f"a picture of {name}"]))
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert texts(tmp_path) == ["a picture of a", "a picture of b"]
    (tmp_path / "a.txt").write_text("a cat")
    assert texts(tmp_path) == ["a cat"]


def test_packed_json_beside_other_files_describes_them_too(tmp_path: Path) -> None:
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b'["a picture of a"]'))
    assert texts(tmp_path) == ["a picture of a"]
    (tmp_path / "a.txt").write_text("a cat")
    assert texts(tmp_path) == ["a cat"]
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.json").write_text('["a picture of b"]')
    assert "has files .json and .json.gz; write a pattern" in refused(tmp_path)


def test_what_cannot_be_unpacked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, packed = tmp_path / "p.txt.gz", gzip.compress(b"a cat\n" * 1000)
    broken = packed[:12] + b"\xff" * 9 + packed[21:]
    for raw in (b"a cat\n", packed[:-9], packed[:30], broken, packed + b"more", b"\x1f"):
        file.write_bytes(raw)
        message = refused(file)
        assert "p.txt.gz cannot be unpacked (" in message and "pack it by gzip again" in message
    file.write_bytes(gzip.compress(b"a cat\n\xff\n"))
    assert "p.txt.gz, line 2: byte 0xff is not UTF-8" in refused(file)
    file.write_bytes(b"")
    assert "holds no prompt" in refused(file)
    file.write_bytes(packed)
    monkeypatch.setattr(text, "UNPACKED", 6000)
    assert len(texts(file)) == 1000
    monkeypatch.setattr(text, "UNPACKED", 5999)
    assert "p.txt.gz unpacks to more than" in refused(file)


def test_packed_under_another_name_is_said(tmp_path: Path) -> None:
    for kind in OF_TEXT:
        (tmp_path / f"p{kind}").write_bytes(gzip.compress(b"a cat\n"))
        assert f"is packed by gzip; rename it to p{kind}.gz, or unpack it" in refused(tmp_path / f"p{kind}")
    (tmp_path / "p.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    assert "ends in '.parquet.gz'; write a .txt, .jsonl, .json" in refused(tmp_path / "p.parquet.gz")


@pytest.mark.parametrize("name", ["p.json", "p.jsonl.gz"])
def test_a_run_says_what_it_read(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": words} for words in ("a red circle", "two blue squares", "a red circle")]
    raw = written(Path(name.removesuffix(".gz")).suffix, rows).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    config = small_config(tmp_path, "refl", f"data.prompts={tmp_path / name}", f"evaluation.prompts={tmp_path / name}")
    train, held_out = prompts.read_prompts(config)
    assert describe_prompts(config, train, held_out, 3, cut=False) == (
        f"prompts: 3 of {tmp_path / name}, 1 of them again, 16 characters at most; 3 to evaluate on, 3 of which are "
        "trained on too; the run draws 3, and none is cut off"
    )
