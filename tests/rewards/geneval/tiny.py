"""Tiny random detectors and a CLIP of transformers' real classes, saved as the folders that people download."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessorPil,
    SwinConfig,
)

# what the published checkpoint calls things, so that every name passes through the table
LABELS = ["person", "aeroplane", "tvmonitor", "mouse", "dog", "sofa"]
NOUNS = ["person", "airplane", "tv", "computer mouse", "dog", "couch"]


def tokenizer(length: int) -> transformers.CLIPTokenizer:
    """CLIP's tokenizer without merges: a token per letter, so any text can be read."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>", model_max_length=length)


OUTSIDE = 30.0
VOCABULARY = 2 * 256 + 2
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": VOCABULARY - 2,
    "eos_token_id": VOCABULARY - 1,
    "pad_token_id": VOCABULARY - 1,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
}


def mask2former(folder: Path) -> Path:
    """12 queries, 6 classes; sure of itself, so that scores lie on both sides of the thresholds."""
    torch.manual_seed(3)
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            image_size=32,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 2, 2, 2],
            window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=12,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        torch.nn.init.normal_(model.class_predictor.weight, std=0.7)
        projection = model.model.pixel_level_module.decoder.mask_projection
        torch.nn.init.normal_(projection.weight, std=1.0)
        torch.nn.init.zeros_(projection.bias)
        embedder = dict(model.model.transformer_module.decoder.mask_predictor.named_parameters())
        for name, parameter in embedder.items():
            torch.nn.init.normal_(parameter, std=0.5 if name.endswith("weight") else 0.0)
        *_, bias = (parameter for name, parameter in embedder.items() if name.endswith("bias"))
        bias[0], projection.bias[0] = 1.0, -OUTSIDE  # most of every mask lies outside the object
    model.save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    return folder


def owl(folder: Path, kind: str) -> Path:
    """An OWL-ViT or OWLv2 that sees 16 patches of 32 × 32 pixels."""
    torch.manual_seed(5)
    settings = {
        "text_config": {**TEXT, "max_position_embeddings": 32},
        "vision_config": {**VISION, "image_size": 32},
        "projection_dim": 16,
    }
    processor: type
    if kind == "owlvit":
        model = OwlViTForObjectDetection(OwlViTConfig(**settings))
        processor = OwlViTImageProcessorPil
    else:
        model = Owlv2ForObjectDetection(Owlv2Config(**settings))
        processor = Owlv2ImageProcessorPil
    model.save_pretrained(folder)
    processor(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer(32).save_pretrained(folder)
    return folder


def clip(folder: Path) -> Path:
    """A CLIP of 32 × 32 pixels and 77 tokens."""
    torch.manual_seed(7)
    settings = {
        "text_config": {**TEXT, "max_position_embeddings": 77, "projection_dim": 16},
        "vision_config": {**VISION, "image_size": 32, "projection_dim": 16},
    }
    model = CLIPModel(CLIPConfig(**settings, projection_dim=16))
    with torch.no_grad():  # far from the tiny initial weights, so that crops differ in what they look like
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        model.vision_model.embeddings.position_embedding.weight.mul_(0.1)
        model.vision_model.embeddings.class_embedding.zero_()
    model.save_pretrained(folder)
    tokenizer(77).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder
