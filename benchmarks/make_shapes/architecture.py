"""The untrained models, and how a model folder is written."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from flowbp_ray.shapes.captions import WORDS
from flowbp_ray.shapes.text import TOKENS

SPECIAL = ("<pad>", "<unk>", "<unused>", "<start>", "<end>")  # id 2 has a meaning of its own in old CLIP configs


def build_tokenizer() -> PreTrainedTokenizerBase:
    """One token a word, in lower case, between a start and an end."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(word, vocabulary[word]) for word in ("<start>", "<end>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<start>",
        eos_token="<end>",
        model_max_length=TOKENS,
    )


def build_text_encoder(tokenizer: PreTrainedTokenizerBase) -> CLIPTextModelWithProjection:
    """Two layers of width 128, trained from scratch with the transformer."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_transformer() -> SD3Transformer2DModel:
    """Six joint blocks of width 160 over 4 x 4 patches; modulation and output start at zero (adaLN-zero)."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=128,
        caption_projection_dim=160,
        pooled_projection_dim=128,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name == "proj_out" or name.startswith("norm_out") or ".norm1" in name:
                nn.init.zeros_(module.weight)
    return transformer


def write_folder(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: CLIPTextModelWithProjection,
    transformer: SD3Transformer2DModel,
    scheduler: FlowMatchEulerDiscreteScheduler,
) -> None:
    """Save as fp16 in the layout of a StableDiffusion3Pipeline; vae/ is written by its own stage."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    text_encoder.half().save_pretrained(folder / "text_encoder")
    transformer.half().save_pretrained(folder / "transformer")
    forget_source(folder / "transformer" / "config.json")
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": transformer.config["_diffusers_version"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    index |= {f"{kind}_{i}": [None, None] for kind in ("text_encoder", "tokenizer") for i in (2, 3)}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    conditioning = {"prompt_embeds": "last_hidden_state", "pooled_prompt_embeds": "text_embeds", "tokens": TOKENS}
    (folder / "conditioning.json").write_text(json.dumps(conditioning, indent=2) + "\n", encoding="utf-8")


def forget_source(config: Path) -> None:
    """Take the name of the folder that a model was loaded from out of its config.json."""
    facts = json.loads(config.read_text(encoding="utf-8"))
    facts.pop("_name_or_path", None)
    config.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
