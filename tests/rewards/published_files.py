"""Small files of the published models' names and real architecture, with random weights, for the tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "##s", "and", "dog", ",", "on", "the", "moon"]
BLIP = {"vision": 128, "layers": 2, "patch": 16, "image": 64, "text": 64, "text_layers": 2, "positions": 40}


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Random tensors: norms near 1, the others large enough that no layer of a small model is a bystander."""
    rng = torch.Generator().manual_seed(seed)

    def one(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=rng)
        if "norm" in name.lower() and name.endswith("weight"):
            return 1 + 0.1 * noise
        return noise * (shape[-1] ** -0.5 if len(shape) == 2 and "embed" not in name else 0.3)

    return {name: one(name, shape) for name, shape in shapes.items()}


def image_reward_shapes(
    vision: int, layers: int, patch: int, image: int, text: int, text_layers: int, positions: int, words: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of ImageReward.pt, written out from the names of the published code, not from ours."""
    both = {"weight": True, "bias": False}
    linear: dict[str, tuple[int, int]] = {}
    norms: dict[str, int] = {"blip.visual_encoder.norm": vision, "blip.text_encoder.embeddings.LayerNorm": text}
    for i in range(layers):
        block = f"blip.visual_encoder.blocks.{i}."
        linear |= {f"{block}attn.qkv": (3 * vision, vision), f"{block}attn.proj": (vision, vision)}
        linear |= {f"{block}mlp.fc1": (4 * vision, vision), f"{block}mlp.fc2": (vision, 4 * vision)}
        norms |= {f"{block}norm1": vision, f"{block}norm2": vision}
    for i in range(text_layers):
        layer = f"blip.text_encoder.encoder.layer.{i}."
        for part, width in (("attention", text), ("crossattention", vision)):
            linear |= {f"{layer}{part}.self.query": (text, text), f"{layer}{part}.output.dense": (text, text)}
            linear |= {f"{layer}{part}.self.{key}": (text, width) for key in ("key", "value")}
            norms[f"{layer}{part}.output.LayerNorm"] = text
        linear |= {f"{layer}intermediate.dense": (4 * text, text), f"{layer}output.dense": (text, 4 * text)}
        norms[f"{layer}output.LayerNorm"] = text
    widths = [text, 1024, 128, 64, 16, 1]
    linear |= {f"mlp.layers.{j}": (widths[n + 1], widths[n]) for n, j in enumerate((0, 2, 4, 6, 7))}
    linear |= {"blip.vision_proj": (256, vision), "blip.text_proj": (256, text)}
    return {
        "blip.visual_encoder.cls_token": (1, 1, vision),
        "blip.visual_encoder.pos_embed": (1, 1 + (image // patch) ** 2, vision),
        "blip.visual_encoder.patch_embed.proj.weight": (vision, 3, patch, patch),
        "blip.visual_encoder.patch_embed.proj.bias": (vision,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (words, text),
        "blip.text_encoder.embeddings.position_embeddings.weight": (positions, text),
        **{
            f"{name}.{end}": shape if matrix else shape[:1]
            for name, shape in linear.items()
            for end, matrix in both.items()
        },
        **{f"{name}.{end}": (width,) for name, width in norms.items() for end in both},
    }


def write_image_reward(folder: Path) -> dict[str, str]:
    """A small ImageReward.pt and a BERT vocabulary; returns the reward's options."""
    weights = drawn(image_reward_shapes(**BLIP, words=len(WORDS) + 2), seed=3)
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(BLIP["positions"])[None]
    torch.save(weights, folder / "ImageReward.pt")
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("\n".join(WORDS))
    return {"path": str(folder / "ImageReward.pt"), "tokenizer": str(folder / "bert")}


QWEN = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "vocab_size": 152064,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
"""config.json of Qwen2-VL-7B-Instruct, the flat form of the transformers of its time."""

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def small_qwen() -> dict[str, object]:
    """The same with two layers of 64 and the ids of `write_qwen`'s tokenizer."""
    ids = {name: 256 + i for i, name in enumerate(SPECIAL)}
    return QWEN | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vocab_size": 304,  # more rows than words, as published
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_config": QWEN["vision_config"] | {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},  # type: ignore[operator]
    }


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE (GPT-2), in the order of the bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(rest)) for byte in range(256)]


def write_qwen(folder: Path) -> Path:
    """A folder with config.json and a byte-level tokenizer with Qwen2-VL's special tokens."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(small_qwen()))
    (folder / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(byte_symbols())}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    added = {
        str(256 + i): {
            "content": name,
            "special": True,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "single_word": False,
        }
        for i, name in enumerate(SPECIAL)
    }
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
