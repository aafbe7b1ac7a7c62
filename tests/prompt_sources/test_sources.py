"""Patterns, folders and saved datasets as sources of prompts: what is read, in which order, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from pyarrow import ipc

from flowbp_ray.prompt_files import Reading, load
from tests.paths import DATA

SAVED, SPLITS = DATA / "prompts" / "saved", DATA / "prompts" / "saved_splits"
CAPTIONS = Reading(columns={"prompt": "caption"})


def texts(source: Path | str, reading: Reading | None = None) -> list[str]:
    return [record.text for record in load(str(source), "data.prompts", reading)]


def refused(source: Path | str, reading: Reading | None = None) -> str:
    """The message, which is one line that names the key of the source."""
    with pytest.raises(ValueError) as caught:
        texts(source, reading)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500 and ("data." in message) and ";" in message
    return message


def test_shards_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for part in (2, 0, 1):
        parquet.write_table(pa.table({"prompt": [f"{part}a", f"{part}b"]}), tmp_path / f"train-0000{part}.parquet")
    wanted = ["0a", "0b", "1a", "1b", "2a", "2b"]
    assert texts(tmp_path / "train-*.parquet") == texts(tmp_path) == wanted
    assert texts(tmp_path / "train-0000[02].parquet") == ["0a", "0b", "2a", "2b"]
    (tmp_path / "deep" / "er").mkdir(parents=True)
    shutil.move(tmp_path / "train-00002.parquet", tmp_path / "deep" / "er")
    assert texts(f"{tmp_path}/**/*.parquet") == ["2a", "2b", *wanted[:4]]
    assert "matches no file" in refused(tmp_path / "test-*.parquet")


def test_a_name_with_brackets_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "mine [1].txt").write_text("a cat\n")
    assert texts(tmp_path / "mine [1].txt") == ["a cat"]


def test_what_lies_beside_data_is_no_data(tmp_path: Path) -> None:
    """A download of the Hub: a card, a licence, a hidden cache."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "part.jsonl").write_text('{"prompt": "a cat"}\n')
    for name in ("README.md", "LICENSE.txt", "requirements.txt", ".cache/huggingface/x.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("no prompt\n")
    assert texts(tmp_path) == ["a cat"]
    (tmp_path / "data" / "more.txt").write_text("a dog\n")
    assert "has files .jsonl and .txt; write a pattern" in refused(tmp_path)


def test_captions_beside_pictures(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.png").write_bytes(b"\x89PNG")
        (tmp_path / f"{name}.txt").write_text(f"a picture of {name}")
    assert texts(tmp_path) == ["a picture of a", "a picture of b"]


@pytest.mark.parametrize(
    "names", [("train.csv", "validation.csv"), ("train/0.csv", "dev/0.csv"), ("a-train-1.csv", "a_val.csv")]
)
def test_splits_by_the_words_in_names(tmp_path: Path, names: tuple[str, str]) -> None:
    """As the datasets library tells them apart, but that one of several must be asked for."""
    for name, text in zip(names, ("a cat", "a dog"), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"prompt\n{text}\n")
    assert texts(tmp_path, Reading(split="train")) == ["a cat"]
    assert texts(tmp_path, Reading(split="validation")) == ["a dog"]
    assert "has the splits train, validation; write data.split=" in refused(tmp_path)
    assert "no split 'test': it has train, validation" in refused(tmp_path, Reading(split="test"))
    (tmp_path / "others.csv").write_text("prompt\na bird\n")
    assert "others such as others.csv; write data.split=" in refused(tmp_path)
    assert "has no splits; write data.split=null" in refused(tmp_path / "others.csv", Reading(split="train"))


def test_a_saved_dataset_is_read_as_datasets_wrote_it() -> None:
    found = load(str(SAVED), "data.prompts", Reading(columns={"prompt": "caption", "skill": "kind"}, weight="share"))
    assert [r.text for r in found] == ["a red circle", "two blue squares", "a green star", "a red circle"]
    assert [r.skill for r in found] == ["color", "counting", "color", "color"]
    assert [r.weight for r in found] == [1.0, 2.0, 0.0, 1.0]
    assert found[1].extra["tags"] == ["two", "blue"] and "picture" not in found[1].extra
    assert texts(SPLITS, Reading(columns={"prompt": "caption"}, split="train")) == ["a green star", "a red circle"]
    assert texts(SPLITS, Reading(columns={"prompt": "caption"}, split="test")) == ["two blue squares"]
    assert texts(SPLITS / "test", CAPTIONS) == texts(SPLITS / "test" / "*.arrow", CAPTIONS) == ["two blue squares"]
    assert "has the splits test, train; write data.split=" in refused(SPLITS, CAPTIONS)
    assert "data.columns={prompt: caption}" in refused(SAVED)


def test_datasets_reads_the_same(tmp_path: Path) -> None:
    """Against the library itself, where it is installed: saved anew in three shards after a selection."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    datasets.disable_progress_bars()
    kept = datasets.load_from_disk(str(SAVED)).select([3, 1, 2])
    kept.save_to_disk(str(tmp_path / "again"), num_shards=3)
    assert (
        texts(tmp_path / "again", CAPTIONS)
        == kept["caption"][:]
        == ["a red circle", "two blue squares", "a green star"]
    )


def test_a_dataset_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    shutil.copytree(SAVED, tmp_path / "saved")
    (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
    assert "misses data-00001-of-00002.arrow" in refused(tmp_path / "saved", CAPTIONS)
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": [{"filename": "../../etc/passwd"}]}')
    assert "does not name its files" in refused(tmp_path / "saved", CAPTIONS)
    shutil.copytree(SPLITS, tmp_path / "splits")
    (tmp_path / "splits" / "test" / "state.json").unlink()
    reading = Reading(columns={"prompt": "caption"}, split="test")
    assert "no test/state.json: it is not whole" in refused(tmp_path / "splits", reading)


def test_arrow_files_of_both_formats(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a cat", "a dog"]})
    with ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    with ipc.new_stream(tmp_path / "stream.arrow", table.schema) as writer:
        writer.write_table(table)
    assert texts(tmp_path / "file.arrow") == texts(tmp_path / "stream.arrow") == ["a cat", "a dog"]
    whole = (tmp_path / "stream.arrow").read_bytes()
    for name, raw in {"torn": whole[: len(whole) // 2], "empty": b"", "text": b"a cat\na dog\n"}.items():
        (tmp_path / f"{name}.arrow").write_bytes(raw)
        message = refused(tmp_path / f"{name}.arrow")
        assert f"{name}.arrow" in message and ("cannot be read as arrow" in message or "no prompt" in message)


@pytest.mark.parametrize("legacy", [False, True], ids=["today's form", "the first form"])
def test_how_a_stream_of_arrow_ends(tmp_path: Path, legacy: bool) -> None:
    """With the mark, also before zeros; without it the file may be what is left of a longer one."""
    file, words = tmp_path / "p.arrow", [f"a cat with {n} hats" for n in range(9)]
    schema = pa.schema({"prompt": pa.string(), "n": pa.int32()})
    with ipc.new_stream(file, schema, options=ipc.IpcWriteOptions(use_legacy_format=legacy)) as writer:
        for word in words:  # a batch each, which ends in the bytes of -1
            writer.write_batch(pa.record_batch([[word, word], [0, -1]], schema=schema))
    whole, mark = file.read_bytes(), 4 if legacy else 8
    for zeros in (0, 4, 8, 64, 4096):
        file.write_bytes(whole + bytes(zeros))
        assert texts(file) == [word for word in words for _ in range(2)]
    for raw in (whole[:-mark], whole + whole, whole + b"\0more", *([] if legacy else [whole[:-mark] + bytes(64)])):
        file.write_bytes(raw)
        message = refused(file)
        assert "p.arrow lacks the mark of its end" in message
        assert message.endswith("if the writer was closed on purpose without it, write it as parquet")


def test_pictures_in_a_table_are_not_read(tmp_path: Path) -> None:
    """A column of a gigabyte costs nothing: what is selected has only the columns without bytes."""
    pictures = [{"bytes": b"\0" * 10, "path": "a.png"}] * 2
    parquet.write_table(pa.table({"prompt": ["a", "b"], "image": pictures, "raw": [b"x", b"y"], "n": [1, 2]}),
                        tmp_path / "p.parquet")  # fmt: skip
    assert [r.extra for r in load(str(tmp_path / "p.parquet"))] == [{"n": 1}, {"n": 2}]


FILES = {
    "csv": "caption,kind,w\na cat,Animals,2\na man,People,0.5\na dog,Animals,1\n",
    "tsv": "Caption\tKind\tW\na cat\tAnimals\t2\na man\tPeople\t0.5\na dog\tAnimals\t1\n",
    "jsonl": '{"caption": "a cat", "kind": "Animals", "w": 2}\n{"caption": "a man", "kind": "People", "w": 0.5}\n'
    '{"caption": "a dog", "kind": "Animals", "w": "1"}\n',
}


@pytest.mark.parametrize("kind", sorted(FILES))
def test_columns_selection_and_weights(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"p.{kind}"
    file.write_text(FILES[kind])
    columns = {"prompt": "caption", "category": "kind"}
    found = load(str(file), "data.prompts", Reading(columns=columns, weight="w"))
    assert [(r.text, r.skill, r.weight) for r in found] == [
        ("a cat", "Animals", 2.0), ("a man", "People", 0.5), ("a dog", "Animals", 1.0)]  # fmt: skip
    if kind == "tsv":  # upper case in the columns' names does not count
        assert [r.weight for r in load(str(file), "data.prompts", Reading(columns=columns, weight="W"))] == [2, 0.5, 1]
        assert texts(file, Reading(columns=columns, where={"Kind": ["People"]})) == ["a man"]
    for column in ("kind", "category"):
        assert texts(file, Reading(columns=columns, where={column: ["Animals"]})) == ["a cat", "a dog"]
    assert "'caption'" in refused(file)
    for reading, words in (
        (Reading(columns={"prompt": "text"}), ["text", "caption"]),
        (Reading(columns={"prompt": "caption", "skill": "kindd"}), ["'kindd' (data.columns.skill)", "'kind'"]),
        (Reading(columns=columns, where={"colour": ["red"]}), ["'colour' (data.where.colour)", "'kind'"]),
        (Reading(columns=columns, where={"kind": ["Food"]}), ["'Animals' (2), 'People' (1)"]),
        (Reading(columns=columns, weight="weight"), ["'weight' (data.weights)", "'w'"]),
        (Reading(columns=columns, where={"caption": ["a cat"]}), ["'caption' (data.where.caption)"]),
        (Reading(columns=columns, weight="kind"), ["data.weights", "'kind' holds 'Animals'", "a number from 0"]),
    ):
        message = refused(file, reading)
        assert file.name in message and all(word in message for word in words), message


def test_weights_that_are_no_use_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    for value in ("-1", "true", "null", "NaN", "Infinity", "[1]"):
        file.write_text(f'{{"prompt": "a cat", "w": 1}}\n{{"prompt": "a dog", "w": {value}}}\n')
        assert "entry 2: data.weights: 'w' holds" in refused(file, Reading(weight="w"))
    file.write_text('{"prompt": "a cat", "w": 1}\n{"prompt": "a dog"}\n')
    assert "1 of 2 entries have nothing under 'w'" in refused(file, Reading(weight="w"))
    file.write_text('{"prompt": "a cat", "w": 0}\n')
    assert "all weights under 'w' (data.weights) are 0" in refused(file, Reading(weight="w"))


def test_tags_select_by_any_of_them() -> None:
    tagged = Reading(columns={"prompt": "caption"}, where={"tags": ["blue", "three"]})
    assert texts(SAVED, tagged) == ["two blue squares"]


def test_plain_text_has_no_columns(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n")
    assert "has no columns; write data.columns=null" in refused(tmp_path / "p.txt", CAPTIONS)
    assert "'w' (data.weights), only ['prompt']" in refused(tmp_path / "p.txt", Reading(weight="w"))


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is a folder without a file of prompts" in refused(tmp_path / "empty")
    assert "does not exist" in refused(tmp_path / "nowhere")
