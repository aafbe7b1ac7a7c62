"""Text in pictures: how near what a recogniser reads comes to what the prompt quotes. No gradient.

The score is 1 − min(N_e, N) / N, where N is the length of the quoted text and N_e the edit distance (Levenshtein) from
it to the text that is read. That is the reward for visual text rendering of Flow-GRPO (Liu et al., arXiv 2505.05470)
and of DiffusionNFT (arXiv 2509.16117), whose code has the same file. Of it (github.com/yifan123/flow_grpo) these are
taken: upper and lower case are alike, spaces are left out of both texts, lines are joined
as they are read, and text that holds the quoted one whole has distance 0. Its recogniser is PaddleOCR; the one here is
RapidOCR's PP-OCRv6, of the same authors and newer, whose weights lie in the package `rapidocr`. Numbers of the two
should not be compared.
"""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowbp_ray.backbones.base import uint8_images
from flowbp_ray.utils.errors import need_package

MODELS = {"Det": "PP-OCRv6_det_small.onnx", "Rec": "PP-OCRv6_rec_small.onnx"}
"""Where text is, and what it says. They are named, so that the package never looks for others to download."""
DOUBLE = re.compile(r'"([^"]*)"|“([^”]*)”|„([^“”]*)[“”]|«([^»]*)»|「([^」]*)」')
SINGLE = re.compile(r"(?<!\w)['‘](?=\S)(.*?\S)['’](?!\w)", re.DOTALL)
HALVES = frozenset('"“”„«»「」')
ALIKE = str.maketrans("‘’ʼ´`“”„«»", "'''''\"\"\"\"\"")
"""Quotation marks and apostrophes that a recogniser does not tell apart."""


class OCR:
    """Detects lines of text, reads them, and compares with the prompt; one picture at a time, on the CPU."""

    name = "ocr"
    differentiable = False

    def __init__(self, confidence: float = 0.5, contained: bool = True, device: str = "cpu") -> None:
        """Load the recogniser; it uses as many threads as torch does.

        confidence: a line counts if the recogniser is at least that sure of it, in 0..1. contained: a picture that
        shows the quoted text and more beside it is right (Flow-GRPO's code); False: what is more costs (its paper's
        formula). device: where the images are; the recogniser stays on the CPU.
        """
        self.check(confidence)
        self.confidence, self.contained = confidence, contained
        self.recogniser = _recogniser(torch.get_num_threads())

    @staticmethod
    def check(confidence: float) -> None:
        """Raise ValueError for a package that is missing and for a confidence outside 0..1."""
        if not 0 <= confidence <= 1:
            raise ValueError(f"reward 'ocr': options.confidence must lie in 0..1, got {confidence}")
        for package in ("rapidocr", "onnxruntime", "rapidfuzz"):
            need_package("reward 'ocr'", package, "ocr")
        if missing := [path.name for path in _models().values() if not path.is_file()]:
            raise ValueError(
                f"reward 'ocr': the installed rapidocr has no {' and no '.join(missing)}; "
                "install the version of constraints/cpu.txt: pip install 'rapidocr>=3.10,<3.11'"
            )

    @staticmethod
    def check_prompts(texts: Sequence[str]) -> None:
        """Raise ValueError, which names the prompt, where one quotes no text: its pictures could not be judged."""
        for text in texts:
            quoted(text)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Nearness in 0..1 for images [B, 3, H, W] (0..1) and B prompts; [B] fp32, no gradient.

        What is read is the picture as saved, in 8 bits. NaN for what is no picture. Raises ValueError for a prompt
        that quotes no text.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images need {len(images)} prompts, got {len(prompts)}")
        wanted = [quoted(text) for text in prompts]
        pictures = torch.isfinite(images).flatten(1).all(dim=1)
        seen = uint8_images(images.detach().nan_to_num().clamp(0, 1))
        scores = [nearness(self.read(image), texts, self.contained) for image, texts in zip(seen, wanted, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=images.device).where(pictures, torch.nan)

    def read(self, image: np.ndarray) -> str:
        """The text of a picture [H, W, 3] uint8: its lines from top to bottom, joined by spaces; "" where none is."""
        found = self.recogniser(np.ascontiguousarray(image[:, :, ::-1]), text_score=self.confidence)  # it reads BGR
        return " ".join(found.txts or ())


def quoted(prompt: str) -> list[str]:
    """The texts that a prompt quotes, in its order, as `plain` writes them. Raises ValueError where there is none.

    They stand in "…", “…”, „…“, «…» or 「…」; only where none does, in '…' or ‘…’, of which an apostrophe within a
    word is no part. Quotes without text do not count.
    """
    if HALVES & set(DOUBLE.sub("", prompt)):
        raise ValueError(f"reward 'ocr': a quotation mark of the prompt {prompt!r:.100} has no other half; write both")
    found = [next(filter(None, match.groups()), "") for match in DOUBLE.finditer(prompt)]
    texts = [text for text in map(plain, found or SINGLE.findall(prompt)) if text]
    if not texts:
        raise ValueError(
            f"reward 'ocr': the prompt {prompt!r:.100} quotes no text, so nothing says what its picture must show; "
            'write it in quotation marks: a sign that says "OPEN"'
        )
    return texts


def plain(text: str) -> str:
    """Lower case, without spaces, in Unicode's compatibility form (NFKC), quotation marks and apostrophes alike."""
    return "".join(unicodedata.normalize("NFKC", text.translate(ALIKE)).lower().split())


def nearness(read: str, texts: Sequence[str], contained: bool = True) -> float:
    """1 − min(N_e, N) / N of what was read, against the quoted `texts` (written by `plain`).

    Several texts are one, in the prompt's order. contained: 1 where each of them stands somewhere in what was read.
    """
    from rapidfuzz.distance import Levenshtein

    said, whole = plain(read), "".join(texts)
    if contained and all(text in said for text in texts):
        return 1.0
    return 1 - min(Levenshtein.distance(said, whole), len(whole)) / len(whole)


def _models() -> dict[str, Path]:
    spec = importlib.util.find_spec("rapidocr")
    assert spec is not None and spec.origin is not None
    return {part: Path(spec.origin).parent / "models" / name for part, name in MODELS.items()}


def _recogniser(threads: int) -> Any:
    """RapidOCR without its classifier of upside-down lines, as Flow-GRPO uses PaddleOCR."""
    import cv2
    from rapidocr import RapidOCR

    cv2.setNumThreads(threads)
    runtime = "EngineConfig.onnxruntime"
    pools = {f"{runtime}.intra_op_num_threads": threads, f"{runtime}.inter_op_num_threads": 1}
    paths = {f"{part}.model_path": str(path) for part, path in _models().items()}
    return RapidOCR(params={"Global.use_cls": False, "Global.log_level": "error", **pools, **paths})
