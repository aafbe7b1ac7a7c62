"""Stage `base`: train the SD3 transformer (5.4 M) and the CLIP text model (0.29 M) together by flow matching.

x_sigma = (1 - sigma) x0 + sigma noise; the target is v = noise - x0; the model's time input is 1000 sigma.
Every batch is drawn from (SEED, step), so a run that was stopped goes on exactly where it was.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase

from flowbp_ray.shapes import load_prompts, model_dir
from flowbp_ray.shapes.text import embed, encode_prompts, tokenize

from .architecture import build_text_encoder, build_tokenizer, build_transformer, write_folder
from .facts import record
from .latents import CAPTIONS, load_latents
from .reading import learn_to_read
from .rewards_helper import Helper
from .sampling import decode, sample_latents, score, sigma_grid

SEED = 31
BATCH = 128
PHASES = (2700, 3900, 7800)  # the rate is annealed towards the end of each: the first two were found to stop too early
RATE = 1.5e-3
WARMUP = 100
ANNEAL = 0.3  # the rate falls linearly to zero over the last 0.3 * (end of the phase) steps
DECAY = 0.02
CAPTION_DROPOUT = 0.1
EMA = 0.998
SHIFT = 1.0  # static shift of the sampling grid; training draws sigma logit-normally, without a shift
EVERY = 200
READING = 5200  # the step at which the text model is taught to read: until then no two things had been told apart
READING_STEPS = 1200
READING_RATE = 1e-3


class Base(nn.Module):
    """Transformer and text model as one module, so that they share optimizer, average and checkpoint."""

    def __init__(self, text_encoder: CLIPTextModelWithProjection, transformer: SD3Transformer2DModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.transformer = transformer

    def forward(self, x: Tensor, sigma: Tensor, ids: Tensor) -> Tensor:
        """The velocity at x [B, 8, 8, 8], sigma [B], given token ids [B, 14]."""
        embeds, pooled = embed(ids, self.text_encoder)
        output = self.transformer(
            hidden_states=x, encoder_hidden_states=embeds, pooled_projections=pooled, timestep=sigma * 1000
        )
        return output.sample


def rate(step: int, phases: tuple[int, ...]) -> float:
    """Warm-up, then plateau and linear anneal of the phase that `step` is in; a factor of the highest rate."""
    end = next(end for end in phases if step < end)
    return min(1.0, (step + 1) / WARMUP, (end - step) / (ANNEAL * end))


def batch(plan: Plan, step: int, latents: Tensor, ids: Tensor, empty: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_sigma, sigma, token ids and target velocity of one step; the randomness is (plan.key, step)."""
    rng = np.random.default_rng((*plan.key, step))
    rows = torch.from_numpy(rng.integers(len(latents), size=BATCH))
    words = ids[rows, torch.from_numpy(rng.integers(CAPTIONS, size=BATCH))]
    words = torch.where(torch.from_numpy(rng.random(BATCH) < CAPTION_DROPOUT)[:, None], empty, words)
    x0 = latents[rows]
    noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32))
    middle, spread = plan.noise
    sigma = (middle + spread * torch.from_numpy(rng.standard_normal(BATCH, dtype=np.float32))).sigmoid()
    weight = sigma[:, None, None, None]
    return (1 - weight) * x0 + weight * noise, sigma, words, noise - x0


def optimizer_of(model: Base) -> torch.optim.AdamW:
    """AdamW with decay on matrices only."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), fused=True)


def read(model: Base, average: Base, tokenizer: PreTrainedTokenizerBase) -> None:
    """Teach the text model what captions state, read off its pooled output; the average takes the result as it is."""
    text = model.text_encoder
    helper = Helper(1, text.config.projection_dim)

    def encode(texts: list[str]) -> Tensor:
        return embed(tokenize(texts, tokenizer), text)[1]

    def log(line: str) -> None:
        print(line, flush=True)

    parameters = [*text.parameters(), *helper.parameters()]
    rng = np.random.default_rng((SEED, READING, 1))
    learn_to_read(encode, parameters, helper, rng, READING_RATE, READING_STEPS, log)
    average.text_encoder.load_state_dict(text.state_dict())


def quick_look(model: Base, tokenizer: PreTrainedTokenizerBase, vae: AutoencoderKL, every: int = 2) -> str:
    """The verifier's pass rate on part of the dev prompts, without guidance."""
    prompts = load_prompts("dev")[::every]
    text = encode_prompts([p.text for p in prompts], tokenizer, model.text_encoder)
    noise = torch.randn(len(prompts), 8, 8, 8, generator=torch.Generator().manual_seed(5))
    latents = sample_latents(model.transformer, text, text, noise, sigma_grid(16, SHIFT), 1.0)
    result = score(decode(vae, latents), prompts)
    skills = " ".join(f"{skill} {value:.2f}" for skill, value in result.skills.items())
    return f"dev {result.passed:.3f} ({skills}) quality {result.quality:.3f} entropy {result.entropy:.2f}"


@dataclass(frozen=True)
class Plan:
    """How a stage trains. phases: see `rate`; highest: the learning rate that it multiplies. noise: mean and standard
    deviation of the logit of sigma. reading: the step at which the text model is taught to read, if at all.
    """

    name: str
    phases: tuple[int, ...]
    highest: float
    noise: tuple[float, float]
    reading: int | None = None
    key: tuple[int, ...] = (SEED,)


BASE = Plan("base", PHASES, RATE, (0.0, 1.0), READING)


def main(args: argparse.Namespace) -> None:
    """Train from nothing, then write tokenizer/, text_encoder/, transformer/, scheduler/ and model_index.json."""
    tokenizer = build_tokenizer()
    tuned = args.work / "vae_tuned"  # the same encoder; the decoder may still be in training beside this
    vae = AutoencoderKL.from_pretrained(tuned if tuned.exists() else args.work / "vae").eval().requires_grad_(False)
    torch.manual_seed(SEED)
    model = Base(build_text_encoder(tokenizer), build_transformer())
    train(args, BASE, model, tokenizer, vae, load_latents(args.work, vae, tokenizer))


def train(
    args: argparse.Namespace,
    plan: Plan,
    model: Base,
    tokenizer: PreTrainedTokenizerBase,
    vae: AutoencoderKL,
    data: tuple[Tensor, Tensor],
) -> None:
    """Train `model` by `plan`, or go on from --work, and write the average of its weights as the model folder."""
    phases = (args.steps,) if args.steps else plan.phases
    empty = tokenize([""], tokenizer)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = optimizer_of(model)
    state_file, first, spent = args.work / f"{plan.name}.pt", 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["cpu"]
    start = time.process_time() - spent
    for step in range(first, phases[-1]):
        if step == plan.reading:
            read(model, average, tokenizer)
        for group in optimizer.param_groups:
            group["lr"] = plan.highest * rate(step, phases)
        x, sigma, words, target = batch(plan, step, *data, empty)
        loss = (model(x, sigma, words) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        keep = min(EMA, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
        if step % 50 == 0:
            print(f"step {step} loss {loss.item():.4f} cpu {time.process_time() - start:.0f} s", flush=True)
        if (step + 1) % EVERY == 0 or step + 1 == phases[-1]:
            cpu = time.process_time() - start
            parts = {"model": model, "average": average, "optimizer": optimizer}
            torch.save({k: v.state_dict() for k, v in parts.items()} | {"step": step + 1, "cpu": cpu}, state_file)
            print(f"step {step + 1} {quick_look(average, tokenizer, vae)}", flush=True)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    cpu = time.process_time() - start
    record(args.work, plan.name, seed=SEED, steps=phases[-1], batch=BATCH, cpu=cpu, scenes=len(data[0]))
    write_folder(model_dir(), tokenizer, average.text_encoder, average.transformer, scheduler)
