"""HPSv3: human preference by a vision-language model (Ma et al., arXiv 2508.03789).

    score = head(h)[0],   head = Linear(d, 1024), ReLU, Dropout, Linear(1024, 16), ReLU, Linear(16, 2), in fp32

h is the hidden state of Qwen2-VL-7B at the token <|Reward|>, which ends the question that it is asked about image and
prompt; head(h)[1] is the logarithm of the deviation, unused here. Higher is better; in the authors' benchmark the
means of the generators lie between about 0 (Stable Diffusion 2) and 10.6 (Kolors).

Three things that the published score depends on and that a reading of the paper would miss:
  - The question must be the published one to the last blank, so it is read from the authors' file and compared with a
    checksum.
  - Positions are 0, 1, 2, … over image and text alike. The authors call the language model without the
    three-dimensional positions of Qwen2-VL, in training too.
  - The authors cast the whole model to bfloat16, and with it the table of rotary frequencies; so does this file.
What follows <|Reward|> cannot change its state (attention looks back only), so it is not computed.
"""

from __future__ import annotations

import ast
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2VLConfig

from flowbp_ray.rewards.base import needed
from flowbp_ray.rewards.embedding import check_pairs, tower_dtype
from flowbp_ray.rewards.files import Shapes, check_finite, check_fit, check_values, one_line, read_shapes, read_tensors
from flowbp_ray.rewards.preprocess import precise
from flowbp_ray.rewards.qwen2vl import MERGE, kept_bytes, older_name, patches, published_config, skeleton
from flowbp_ray.rewards.rows import score_rows
from flowbp_ray.rewards.skeleton import Skeleton, dtype_of
from flowbp_ray.utils.addresses import existing_path

NAME = "hpsv3"
PIXELS = 256 * 28 * 28
WORDS = 768
"""Tokens of the question and a prompt, about: for plans."""
REWARD, IMAGE, PROMPT = "<|Reward|>", "<|image_pad|>", "{text_prompt}"
QUESTION_SHA256 = "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"
WEIGHTS = "HPSv3.safetensors (17 GB) of MizzenAI/HPSv3 on the Hugging Face hub"
BACKBONE = "a folder with config.json and the tokenizer files of Qwen/Qwen2-VL-7B-Instruct; its weights are not needed"
QUESTION = (
    "the question HPSv3 was trained with: hpsv3/dataset/data_collator_qwen.py of the package hpsv3, "
    "which `pip download --no-deps hpsv3==1.0.0` fetches as a zip"
)


class HPSv3:
    """HPSv3 (module docstring) on [B, 3, H, W] in 0..1; every image is resized to about 256 · 28² pixels.

    Rows are scored one at a time, each with its own backward at once (`rewards.rows`): the activations of one image
    take some gigabytes of a 7B model (an estimate, not measured), so those of a batch would not fit.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        backbone: str | Path | None = None,
        question: str | Path | None = None,
        published_question: bool = True,
        device: str = "cpu",
        dtype: str = "bfloat16",
    ) -> None:
        """Load the published file.

        path: HPSv3.safetensors. backbone: folder of Qwen2-VL-7B-Instruct's configuration and tokenizer.
        question: the authors' data_collator_qwen.py, or a text file with {text_prompt} and <|Reward|> in it.
        published_question: refuse a question that is not the published one; false for a model of one's own.
        dtype: of the backbone; the head is fp32 at least. Raises ValueError as `check` does.
        """
        file, self.tokenizer, config, self.question = _opened(path, backbone, question, published_question)
        self.name = NAME
        self.device, self.dtype = torch.device(device), tower_dtype(NAME, dtype)
        self.model, self.head = skeleton(config), head(config.text_config.hidden_size, "meta")
        loaded = read_tensors(file, device)
        check_finite(NAME, file, loaded)
        wanted = self.model.state_dict()
        self.model.load_state_dict({name: loaded[older_name(name)] for name in wanted}, assign=True)
        self.head.load_state_dict({name: loaded[f"rm_head.{name}"] for name in self.head.state_dict()}, assign=True)
        self.model.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)
        high = torch.promote_types(self.dtype, torch.float32)
        self.head.to(self.device, high).eval().requires_grad_(False)

    @staticmethod
    def check(
        path: str | Path | None,
        backbone: str | Path | None,
        question: str | Path | None,
        published_question: bool,
        dtype: str,
    ) -> None:
        """Raise ValueError for a file or folder that is missing, is another model's, or does not fit the others.

        So it does where a value is not finite.
        """
        file, *_ = _opened(path, backbone, question, published_question)
        check_values(NAME, file)
        tower_dtype(NAME, dtype)

    @staticmethod
    def skeleton(backbone: str | Path | None, dtype: str) -> Skeleton:
        """By config.json of `backbone`, or as published. What a row keeps is estimated (`qwen2vl.kept_bytes`)."""
        found = None if backbone is None else existing_path(backbone)
        known = found is not None and (found / "config.json").is_file()
        config: Any = Qwen2VLConfig.from_pretrained(str(found), local_files_only=True) if known else published_config()
        kind, side = dtype_of(dtype), math.isqrt(PIXELS)
        return Skeleton(skeleton(config), kind, side, row=kept_bytes(config, PIXELS, WORDS, kind.itemsize))

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] of images [B, 3, H, W] against B prompts. Differentiable once in the images."""
        check_pairs(NAME, images, prompts)
        return score_rows(self._one, precise(images), prompts)  # bf16 would lose what a resize averages

    def _one(self, image: Tensor, prompt: str) -> Tensor:
        """The score of one image [3, H, W]; a scalar."""
        high = torch.promote_types(self.dtype, torch.float32)
        cut, (rows, columns) = patches(image.to(self.device), PIXELS)
        ids = torch.tensor([self.words(prompt, rows * columns // MERGE**2)], device=self.device)
        out = self.model(
            input_ids=ids,
            position_ids=torch.arange(ids.shape[1], device=self.device).expand(3, 1, -1),
            pixel_values=cut.to(self.dtype),
            image_grid_thw=torch.tensor([[1, rows, columns]], device=self.device),
            use_cache=False,
        )
        score: Tensor = self.head(out.last_hidden_state[0, -1].to(high))[0]
        return score

    def words(self, prompt: str, tokens: int) -> list[int]:
        """Ids of Qwen2-VL's chat up to and with <|Reward|>: system, then the image (`tokens` of them) and the question.

        Raises ValueError for a prompt that itself contains one of the two tokens the score depends on.
        """
        for special in (REWARD, IMAGE):
            if special in prompt:
                raise ValueError(
                    f"reward {NAME!r} cannot read a prompt with {special} in it: {prompt!r:.100}; remove it"
                )
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f"<|vision_start|>{IMAGE * tokens}<|vision_end|>{self.question.replace(PROMPT, prompt)}"
        )
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids[: ids.index(self.tokenizer.convert_tokens_to_ids(REWARD)) + 1]


def head(width: int, device: str) -> nn.Sequential:
    """The published rm_head; the dropout holds the indices of its linear layers at 0, 3, 5."""
    layers: list[nn.Module] = [nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(16, 2)).to(device)


def wanted(config: Any) -> Shapes:
    """Name -> shape of what the file of a model of this configuration holds; reads and allocates nothing."""
    model = skeleton(config).state_dict()
    shapes = {older_name(name): tuple(tensor.shape) for name, tensor in model.items()}
    rest = head(config.text_config.hidden_size, "meta").state_dict()
    return shapes | {f"rm_head.{name}": tuple(tensor.shape) for name, tensor in rest.items()}


def read_question(file: Path) -> str:
    """The question with its two marks. From the authors' Python file two constants are read; none of it is run."""
    constants: dict[str, Any] = {}
    try:
        text = file.read_text(encoding="utf-8")
        statements = ast.parse(text).body if file.suffix == ".py" else []
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        raise ValueError(f"reward {NAME!r}: {file} cannot be read ({error}); give {QUESTION}") from error
    if file.suffix == ".py":
        for node in statements:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                constants |= {name.id: node.value.value for name in node.targets if isinstance(name, ast.Name)}
        parts = ("INSTRUCTION", "prompt_with_special_token")
        if not all(isinstance(constants.get(part), str) for part in parts):
            raise ValueError(f"reward {NAME!r}: {file} does not define {' and '.join(parts)}; give {QUESTION}")
        text = "".join(constants[part] for part in parts)
    for mark in (PROMPT, REWARD):
        if text.count(mark) != 1:
            raise ValueError(
                f"reward {NAME!r}: {file} must contain {mark} once, and does {text.count(mark)} times; write {QUESTION}"
            )
    return text


def _opened(
    path: str | Path | None, backbone: str | Path | None, question: str | Path | None, published_question: bool
) -> tuple[Path, Any, Any, str]:
    """The weights' file, tokenizer, configuration and question, which fit each other; no value of a weight is read."""
    file = needed(NAME, "path", path, WEIGHTS)
    folder = needed(NAME, "backbone", backbone, BACKBONE)
    source = needed(NAME, "question", question, QUESTION)
    text = read_question(source)
    if published_question and hashlib.sha256(text.encode()).hexdigest() != QUESTION_SHA256:
        raise ValueError(
            f"reward {NAME!r}: the question in {source} is not the published one, to which blanks at line ends belong; "
            f"give {QUESTION}, or write published_question: false if your model was trained with another"
        )
    tokenizer = _tokenizer(folder)
    config = _config(folder, len(tokenizer))
    if tokenizer.convert_tokens_to_ids(IMAGE) != config.image_token_id:  # transformers makes up an empty tokenizer
        raise ValueError(
            f"reward {NAME!r}: the tokenizer in {folder} is not Qwen2-VL's; options.backbone must be {BACKBONE}"
        )
    # lm_head.weight writes text; a score does not need it
    found = {name: shape for name, shape in read_shapes(file).items() if name != "lm_head.weight"}
    check_fit(NAME, file, found, wanted(config), WEIGHTS)
    return file, tokenizer, config, text


def _config(folder: Path, vocabulary: int) -> Any:
    """The backbone's configuration; the published weights have as many words as the tokenizer with <|Reward|>."""
    try:
        config: Any = Qwen2VLConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers has a class of its own for a value of another type
        why = one_line(error)
        raise ValueError(
            f"reward {NAME!r}: no config.json that can be used in {folder} ({why}); options.backbone must be {BACKBONE}"
        ) from error
    text = config.text_config
    rotary = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}  # transformers 5 and 4
    sections = rotary.get("mrope_section")
    if not isinstance(sections, list) or 2 * sum(sections) != text.hidden_size // text.num_attention_heads:
        raise ValueError(
            f"reward {NAME!r}: config.json in {folder} has the mrope_section {sections}, which does not fit its heads; "
            f"options.backbone must be {BACKBONE}"
        )
    text.vocab_size = vocabulary
    return config


def _tokenizer(folder: Path) -> Any:
    """Qwen2's tokenizer with <|Reward|> as its last token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises that, transformers whatever its code meets
        raise ValueError(f"reward {NAME!r}: no tokenizer in {folder}; options.backbone must be {BACKBONE}") from error
    tokenizer.add_tokens([REWARD], special_tokens=True)
    return tokenizer
