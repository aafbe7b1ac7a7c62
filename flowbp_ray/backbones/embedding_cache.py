"""A cache of embeddings on disk, shared by runs: one safetensors file per prompt, in one folder per encoder.

    <cache>/<encoder>/<prompt>.safetensors     its tensors in their own dtype, with the prompt and their digest
    <cache>/<encoder>/encoder.json             the text whose sha256 is <encoder>
    <cache>/files/                             facts about large files, such as digests (`cached_file_fact`)

<encoder> is the sha256 over everything that affects the embeddings' bits: the contents of every file of the encoders
and tokenizers (not their path), the family's settings, the threads, the device, and the versions of the libraries that
compute. <prompt> is the sha256 of the prompt. A file is renamed to its final name once it is written, so several runs
can fill one cache at the same time.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flowbp_ray.backbones.base import Backbone, Conditioning
from flowbp_ray.utils.digest import digest, file_digest
from flowbp_ray.utils.files import unusable_cache, write_atomically

LIBRARIES = ("torch", "transformers", "tokenizers", "diffusers")

log = logging.getLogger(__name__)


class CachedEmbeddings:
    """The embeddings of one encoder by prompt, to read. It knows nothing of the encoder but the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broken: list[Path] = []

    def path(self, prompt: str) -> Path:
        return self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()}.safetensors"

    def read(self, prompt: str) -> Conditioning | None:
        """The prompt's conditioning [1, ...]; None if it is not in the cache, or if its file is broken.

        The tensors are the file's own pages, mapped and not copied: clone what is to be kept for long. No file is ever
        changed in place.
        """
        path = self.path(prompt)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                stated: dict[str, str] = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            why = str(error)
        else:
            if stated == _statement(prompt, tensors):
                return tensors
            why = "its contents are not what it states"
        self.broken.append(path)
        log.warning("%s is broken and is encoded again: %s", path, why)
        return None


class EmbeddingCache(CachedEmbeddings):
    """The embeddings of one encoder by prompt, to read and to add to."""

    def __init__(self, root: Path, backbone: Backbone, threads: int, device: str = "cpu") -> None:
        """Hash the encoders' files. Raises ValueError if one of their folders is missing."""
        self.stated = identity(backbone, threads, device, root / "files")
        super().__init__(root / hashlib.sha256(self.stated.encode()).hexdigest())

    def write(self, prompt: str, tensors: Conditioning) -> None:
        """Add a prompt. Raises ValueError if the folder cannot be written."""
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "encoder.json").is_file():
                write_atomically(self.folder / "encoder.json", lambda path: path.write_text(self.stated))
            write_atomically(self.path(prompt), lambda path: save_file(whole, path, _statement(prompt, whole)))
        except (OSError, SafetensorError) as error:
            raise ValueError(unusable_cache(self.folder, error)) from error


def identity(backbone: Backbone, threads: int, device: str, memory: Path) -> str:
    """Everything that affects an embedding's bits except the prompt, as JSON. memory: folder of cached file digests."""
    stated = {
        "files": {
            f"{part.name}/{file.relative_to(part)}": file_digest(file, memory)
            for part in backbone.encoder_parts()
            for file in _files(part)
        },
        "settings": backbone.encoder_settings(),
        "threads": threads,
        "device": device,
        "versions": {library: version(library) for library in LIBRARIES},
    }
    return json.dumps(stated, indent=1, sort_keys=True)


def _files(part: Path) -> Sequence[Path]:
    """All files of a component except hidden ones, sorted. Raises ValueError if its folder is missing."""
    if not part.is_dir():
        raise ValueError(f"{part.parent} has no {part.name}: the folder {part.name}/ is missing")
    return sorted(p for p in part.rglob("*") if p.is_file() and not p.name.startswith("."))


def _statement(prompt: str, tensors: Conditioning) -> dict[str, str]:
    return {"prompt": prompt, "sha256": digest(tensors)}
