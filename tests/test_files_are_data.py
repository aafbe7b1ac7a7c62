"""No file that the product loads is code: a pickle that runs a command is planted at each path, and never does."""

from __future__ import annotations

import ast
import hashlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from flowbp_ray.backbones.embedding_cache import CachedEmbeddings
from flowbp_ray.backbones.finite import check_finite
from flowbp_ray.backbones.folder import Folder
from flowbp_ray.backbones.stored import read_shapes, weight_files
from flowbp_ray.benching import profile
from flowbp_ray.config import loading
from flowbp_ray.messages import Packed
from flowbp_ray.observability.reader import Reader
from flowbp_ray.prompts import load
from flowbp_ray.rewards import base
from flowbp_ray.rewards.remote import codec
from flowbp_ray.rewards.remote.wire import EvaluateRequest
from flowbp_ray.run.engine_state import EngineState
from flowbp_ray.run.folder import Run
from flowbp_ray.run.manifest import read_manifest, write_manifest
from tests import bombs
from tests.conftest import Saved
from tests.paths import ROOT
from tests.rewards import published_files, test_hpsv3
from tests.rewards.geneval import tiny
from tests.rewards.tiny_clip import aesthetic, clip, hpsv2
from tests.run.test_checkpoints import FILES
from tests.run.test_checkpoints import saved as saved_checkpoints
from tests.small import small_config

CLASSES = {
    "transformer": "SD3Transformer2DModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModelWithProjection",
}
"""Components that diffusers loads, and one that transformers does."""


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """The folder that a bomb would make; none has when the test is over."""
    path = tmp_path / "a bomb went off"
    yield path
    assert not path.exists()


def refused(call: Callable[[], Any], match: str | None = None) -> None:
    """The call raises ValueError with one line."""
    with pytest.raises(ValueError, match=match) as error:
        call()
    assert "\n" not in str(error.value)


def test_the_bombs_are_live(tmp_path: Path) -> None:
    """Each goes off where it is unpickled without care, so that the tests below show something."""
    marker, file = tmp_path / "off", tmp_path / "file"
    for form in bombs.FORMS:
        file.write_bytes(bombs.bytes_of(form, marker))
        if form == "npy":
            np.load(file, allow_pickle=True)
        elif form == "pickle":
            pickle.loads(file.read_bytes())
        else:
            torch.load(file, weights_only=False)
        assert bombs.exploded(marker), form


@pytest.mark.parametrize("form", bombs.FORMS)
@pytest.mark.parametrize("part", CLASSES)
@pytest.mark.parametrize("shards", [False, True])
def test_weights_of_a_model(saved: Saved, tmp_path: Path, marker: Path, part: str, form: str, shards: bool) -> None:
    """By our own checks, and by the library that loads them after these."""
    folder, _ = saved("sd35")
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    for file in (copy / part).glob("*.safetensors"):
        file.unlink()
    stem = "pytorch_model" if part == "text_encoder" else "diffusion_pytorch_model"
    name = f"{stem}-00001-of-00001.bin" if shards else f"{stem}.bin"
    (copy / part / name).write_bytes(bombs.bytes_of(form, marker))
    if shards:
        (copy / part / f"{stem}.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    refused(lambda: read_shapes(weight_files(copy / part)), "weights cannot be read|nothing in it was run")
    if not shards:
        refused(lambda: check_finite(copy / part))
    refused(lambda: Folder(str(copy), "sd35").model(part, CLASSES[part], torch.float32), f"has a broken {part}")


def test_a_pickle_beside_safetensors_is_not_read(saved: Saved, tmp_path: Path, marker: Path) -> None:
    folder, _ = saved("sd35")
    shutil.copytree(folder, tmp_path / "model")
    for part in CLASSES:
        for stem in ("pytorch_model", "diffusion_pytorch_model"):
            (tmp_path / "model" / part / f"{stem}.bin").write_bytes(bombs.bytes_of("zip", marker))
        Folder(str(tmp_path / "model"), "sd35").model(part, CLASSES[part], torch.float32)


def geneval(folder: Path, detector: str) -> dict[str, Any]:
    made = tiny.mask2former(folder / "d") if detector == "mask2former" else tiny.owl(folder / "d", detector)
    line = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"}
    (folder / "prompts.jsonl").write_text(json.dumps(line) + "\n")
    named = {"detector": made, "clip": tiny.clip(folder / "clip"), "prompts": folder / "prompts.jsonl"}
    return {name: str(path) for name, path in named.items()}


REWARDS: dict[str, tuple[str, Callable[[Path], dict[str, Any]], str]] = {
    "clipscore": ("clipscore", clip, "path"),
    "pickscore": ("pickscore", clip, "path"),
    "aesthetic's head": ("aesthetic", aesthetic, "path"),
    "aesthetic's tower": ("aesthetic", aesthetic, "clip"),
    "image_reward": ("image_reward", published_files.write_image_reward, "path"),
    "hpsv2": ("hpsv2", hpsv2, "path"),
    "hpsv3": ("hpsv3", test_hpsv3.write_hpsv3, "path"),
    "geneval's Mask2Former": ("geneval", lambda folder: geneval(folder, "mask2former"), "detector"),
    "geneval's OWL-ViT": ("geneval", lambda folder: geneval(folder, "owlvit"), "detector"),
    "geneval's OWLv2": ("soft_geneval", lambda folder: geneval(folder, "owlv2"), "detector"),
    "geneval's CLIP": ("geneval", lambda folder: geneval(folder, "mask2former"), "clip"),
}
"""A reward, what writes its files into a folder and returns its options, and the option with the weights."""


@pytest.mark.parametrize("case", REWARDS)
def test_weights_of_a_reward(tmp_path: Path, marker: Path, case: str) -> None:
    """As a pickle where the reward takes one, under any name; and in the place of safetensors."""
    kind, options, option = REWARDS[case]
    given = options(tmp_path)
    base.build(kind, **given)  # it is right as it is
    where = Path(given[option])
    files = [where]
    if where.is_dir():
        [weights] = where.glob("*.safetensors")
        files = [weights, weights.with_name("pytorch_model.bin")]
        weights.unlink()
    for file in files:
        for name in {file.name, f"{file.stem}.pt"} if where.is_file() else {file.name}:
            planted = {**given, option: str(file.with_name(name) if where.is_file() else where)}
            for form in bombs.FORMS:
                file.with_name(name).write_bytes(bombs.bytes_of(form, marker))
                refused(lambda planted=planted: base.build(kind, **planted))
                assert not marker.exists(), (name, form)
        if where.is_dir():
            file.unlink()


@pytest.mark.parametrize("name", FILES)
def test_files_of_a_checkpoint(tmp_path: Path, marker: Path, name: str) -> None:
    """The manifest has the planted file's digest, as whoever can write there would see to."""
    checkpoints = saved_checkpoints(tmp_path / "checkpoints", 1, 2)
    folder = checkpoints.path(2)
    for form in (*bombs.FORMS, "npz"):
        data = bombs.bytes_of(form, marker) if form != "npz" else bombs.npz_of(marker, "a", "images|1|1.0")
        (folder / name).write_bytes(data)
        if name == "manifest.json":
            refused(lambda: read_manifest(folder))
            continue
        write_manifest(folder, read_manifest(folder) | {name: [hashlib.sha256(data).hexdigest()]})
        assert checkpoints.damages(2) == []
        reads = {
            "weights": lambda: checkpoints.weights(2),
            "average": lambda: checkpoints.weights(2, average=True),
            "evaluations": lambda: checkpoints.evaluations(2),
            "unjudged": lambda: checkpoints.unjudged(2),
        }
        read = reads.get(name.split(".")[0], lambda: EngineState(folder).fill(torch.zeros(6), "master", "w"))
        refused(read)
        assert not marker.exists(), form


def test_files_of_a_run(tmp_path: Path, marker: Path) -> None:
    """Its configuration, status, metrics and environment."""
    for name in ("config.yaml", "status.json", "metrics.jsonl", "environment.jsonl", "driver.json"):
        for form in bombs.FORMS:
            run = Run.create(small_config(tmp_path))
            (run.folder / name).write_bytes(bombs.bytes_of(form, marker))
            for read in (lambda r=run: Run.open(r.folder).config, lambda r=run: Reader(r.folder).snapshot()):
                try:
                    read()
                except (ValueError, OSError) as error:
                    assert "\n" not in str(error)
            assert not marker.exists(), (name, form)


def test_a_configuration_makes_no_objects(tmp_path: Path, marker: Path) -> None:
    for text in (f"!!python/object/apply:os.mkdir ['{marker}']", f"name: !!python/object/apply:os.mkdir ['{marker}']",
                 f"name: !!python/object/new:os.mkdir ['{marker}']", f"name: ${{eval:os.mkdir('{marker}')}}",
                 f"name: {{_target_: os.mkdir, path: '{marker}'}}"):  # fmt: skip
        (tmp_path / "c.yaml").write_text(text)
        refused(lambda: loading.load(tmp_path / "c.yaml"))
        with suppress(ValueError):  # some are a text like any other
            loading.load("shapes_flowbp_sparse", [f"output={text}"])


def test_files_of_prompts(tmp_path: Path, marker: Path) -> None:
    for ending in ("txt", "jsonl", "csv", "parquet"):
        for form in bombs.FORMS:
            (tmp_path / f"p.{ending}").write_bytes(bombs.bytes_of(form, marker))
            refused(lambda ending=ending: load(str(tmp_path / f"p.{ending}")))


def test_a_type_in_a_parquet_file_is_not_built(tmp_path: Path, marker: Path) -> None:
    """Arrow's type that Python unpickles (CVE-2023-47248)."""
    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type",
                b"ARROW:extension:metadata": bombs.bytes_of("pickle", marker)}  # fmt: skip
    schema = pyarrow.schema([pyarrow.field("prompt", pyarrow.string(), metadata=metadata)])
    pyarrow.parquet.write_table(pyarrow.table([["a red circle"]], schema=schema), tmp_path / "p.parquet")
    try:
        assert [record.text for record in load(str(tmp_path / "p.parquet"))] == ["a red circle"]
    except ValueError as error:
        assert "\n" not in str(error)


def test_other_files(tmp_path: Path, marker: Path) -> None:
    """The embedding cache, profiles of emulated runs, and what comes to a reward server."""
    cache = CachedEmbeddings(tmp_path)
    for form in bombs.FORMS:
        data = bombs.bytes_of(form, marker)
        cache.path("a").write_bytes(data)
        assert cache.read("a") is None and cache.broken[-1] == cache.path("a")
        (tmp_path / "profile.json").write_bytes(data)
        refused(lambda: profile.load(str(tmp_path / "profile.json")))
        refused(lambda data=data: codec.parse(EvaluateRequest, data), "no safetensors file")
        with pytest.raises((codec.WireError, TypeError, ValueError)):
            codec.dump(Packed(np.array([bombs.Bomb(marker)], dtype=object), "object"))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_model_folder_is_not_run(tmp_path: Path, marker: Path, file: str) -> None:
    """An `auto_map` names classes in a Python file of the folder, which transformers would import if told to."""
    given = geneval(tmp_path, "owlvit")
    folder = Path(given["detector"])
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    names = ("AutoConfig", "AutoModel", "AutoModelForZeroShotObjectDetection", "AutoImageProcessor")
    mapped: dict[str, Any] = {name: "code.Thing" for name in names} | {"AutoTokenizer": ["code.Thing", "code.Thing"]}
    plain = json.loads((folder / file).read_text()) | {"auto_map": mapped}
    for changed in (plain, plain | {"tokenizer_class": "Unknown"}):
        (folder / file).write_text(json.dumps(changed))
        with suppress(ValueError, OSError, KeyError):
            base.build("geneval", **given)
        assert not marker.exists()


UNSAFE = {"pickle.load", "pickle.loads", "pickle.Unpickler", "eval", "exec", "compile", "yaml.unsafe_load",
          "yaml.full_load", "os.system", "joblib.load", "dill.load", "dill.loads", "marshal.loads",
          "shelve.open"}  # fmt: skip
ALLOWED = {("actors/jobs.py", "pickle.loads"), ("flowbp_ray/backbones/stored.py", "torch.load"),
           ("flowbp_ray/rewards/files.py", "torch.load")}  # fmt: skip
"""Messages within Ray, which are pickles anyway; and torch.load with weights_only=True."""


def test_the_source_has_no_other_way_of_loading() -> None:
    found = set()
    for package in ("flowbp_ray", "actors"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call | ast.Attribute):
                    continue
                name = ast.unparse(node.func if isinstance(node, ast.Call) else node)
                given = {k.arg: ast.unparse(k.value) for k in node.keywords} if isinstance(node, ast.Call) else {}
                where = (path.relative_to(ROOT).as_posix(), name)
                if name in UNSAFE:
                    found.add(where)
                if name == "torch.load" and isinstance(node, ast.Call):
                    assert given.get("weights_only") == "True", where
                    found.add(where)
                assert given.get("trust_remote_code", "False") == "False", where
                assert given.get("allow_pickle", "False") == "False", where
                if name == "yaml.load" and isinstance(node, ast.Call):
                    assert "Loader" in ast.unparse(node), where
    assert found == ALLOWED
