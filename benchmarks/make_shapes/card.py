"""Stage `card`: score the committed base on the held-out prompts and write the model card with all digests."""

from __future__ import annotations

import argparse
import hashlib
import math
from pathlib import Path

import torch

from flowbp_ray.shapes import SKILLS, load_prompts, model_dir
from flowbp_ray.shapes.prompts import DATA
from flowbp_ray.shapes.text import ShapesModels, encode_prompts, load_models

from .facts import recall
from .sampling import Score, decode, sample_latents, score, sigma_grid
from .vae import evaluate

NOISE_SEED = 51
STEPS = 16
GUIDANCES = (1.0, 2.0, 3.0)
TRAINED = ("vae", "decoder", "base", "looks", "mixture")

HEAD = """# Models of the shapes domain

Small models of the real diffusers and transformers classes, trained from scratch on renderings of a compositional world
(6 shapes x 8 colours on a light background, 64x64), so that post-training can be tried, and its truth checked, on a
laptop. `model/` has the layout of a `StableDiffusion3Pipeline`; `rewards/` has the reward models and a card of its own;
`prompts/` has the prompts. Nothing here came from the outside: no data set, no pretrained weight.

- Licence: Apache-2.0, as the rest of the repository.
- Intended use: tests, demonstrations and studies of reward backpropagation. The models know 40 words and draw nothing
  but these shapes.
- Stored in fp16. Load them as `flowbp_ray.shapes.text.load_models()`, in fp32 unless told otherwise.

## Conventions

x_sigma = (1 - sigma) x0 + sigma noise; the transformer predicts v = noise - x0 and takes 1000 sigma as its time input.
x0 is the latent minus `shift_factor`, times `scaling_factor`. Sampling grid: sigma = 1 ... 0 in equal steps, with the
static shift in `scheduler/` (1). `prompt_embeds` is the text model's `last_hidden_state` (14 tokens) and
`pooled_prompt_embeds` its `text_embeds` (`conditioning.json` says so too). The negative of guidance is the empty
caption. `flowbp_ray.shapes.text.load_pipeline()` gives the stock pipeline, to be called with embeddings.
"""

ABOUT = """
The base first saw {scenes:,.0f} clean scenes, encoded once, each with four paraphrases: flow matching with logit-normal
sigmas in fp32, AdamW at 1.5e-3 with decay, one caption in ten empty, an average of the weights. At step 5,200 its text
model was taught to read captions on its own (1,200 batches of text). The encoder was trained with the decoder (stage
vae), then frozen while the decoder was trained further on slightly noisy latents (stage decoder).

Then came pictures that are drawn well or badly, which no caption says (`flowbp_ray.shapes.look`): a fifth are clean,
the others washed out, blurred, ragged or stained, or several of these. The autoencoder went on with them (stage looks),
and the base on {mixed:,.0f} scenes in the new latents, more of them with relations, and more noise (stage mixture).
"""

TAIL = """
## Held-out combinations

A fifth of the combinations never occur in a training scene or caption, stated or not: 10 of the 48 (shape, colour)
pairs, 3 of the 15 shape pairs, a fifth of the spatial facts, of the coloured counts and of the colour bindings. The
prompts of `heldout.jsonl` and `dev.jsonl` each name exactly one of them; the two share no prompt. Six shapes cannot be
held out, so single-object prompts are new sentences about known shapes. Choose rates and steps on `dev.jsonl`, report
on `heldout.jsonl`.

## Making it again

`python -m benchmarks.make_shapes all` (seeds as above, one thread; {minutes:.0f} CPU minutes without the rewards).
Weights repeat bit for bit only on the same processor and library versions; the scores repeat within their error.
"""


@torch.no_grad()
def score_base(models: ShapesModels, split: str, guidance: float) -> Score:
    """The verifier's view of one picture for each prompt of a split."""
    prompts = load_prompts(split)
    text = encode_prompts([p.text for p in prompts], models.tokenizer, models.text_encoder)
    negative = encode_prompts([""], models.tokenizer, models.text_encoder)
    noise = torch.randn(len(prompts), 8, 8, 8, generator=torch.Generator().manual_seed(NOISE_SEED))
    sigmas = sigma_grid(STEPS, float(models.scheduler.config.shift))
    latents = sample_latents(models.transformer, text, negative, noise, sigmas, guidance)
    return score(decode(models.vae, latents), prompts)


def digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def score_table(models: ShapesModels) -> list[str]:
    """Pass rates per skill in percent, one row for each guidance; the dev split without guidance too."""
    lines = ["| prompts | guidance | all | " + " | ".join(SKILLS) + " | quality | colour entropy (bits) |"]
    lines.append("|---" * (len(SKILLS) + 5) + "|")
    for split, guidance in [("heldout", g) for g in GUIDANCES] + [("dev", 1.0)]:
        result = score_base(models, split, guidance)
        error = 100 * math.sqrt(result.passed * (1 - result.passed) / len(load_prompts(split)))
        skills = " | ".join(f"{100 * result.skills[skill]:.0f}" for skill in SKILLS)
        name = f"{guidance:g}" if guidance != 1 else "none"
        lines.append(
            f"| {split} | {name} | {100 * result.passed:.1f} ± {error:.1f} | {skills} | "
            f"{100 * result.quality:.0f} | {result.entropy:.2f} |"
        )
        print(lines[-1], flush=True)
    return lines


def parts_table(models: ShapesModels) -> list[str]:
    """Parameters and digest of every weight file under model/; rewards/ has a card of its own."""
    modules = {"vae": models.vae, "text_encoder": models.text_encoder, "transformer": models.transformer}
    lines = ["| file | parameters | bytes | sha256 |", "|---|---|---|---|"]
    for path in sorted(model_dir().rglob("*.safetensors")):
        count = f"{sum(p.numel() for p in modules[path.parent.name].parameters()):,}"
        lines.append(f"| {path.relative_to(DATA).as_posix()} | {count} | {path.stat().st_size:,} | {digest(path)} |")
    return lines


def training_table(work: Path) -> list[str]:
    """Seed, length and CPU time of each stage."""
    lines = ["| stage | seed | steps x batch | CPU minutes (one thread) |", "|---|---|---|---|"]
    for stage in TRAINED:
        facts = recall(work, stage)
        length = f"{facts['steps']:.0f} x {facts['batch']:.0f}"
        lines.append(f"| {stage} | {facts['seed']:.0f} | {length} | {facts['cpu'] / 60:.0f} |")
    return lines


def main(args: argparse.Namespace) -> None:
    """Write README.md beside the models."""
    models = load_models()
    psnr, passed = evaluate(models.vae)
    minutes = sum(recall(args.work, stage)["cpu"] for stage in TRAINED) / 60
    text = [
        HEAD,
        "## Parts\n",
        *parts_table(models),
        "\n## Training\n",
        *training_table(args.work),
        ABOUT.format(scenes=recall(args.work, "base")["scenes"], mixed=recall(args.work, "mixture")["scenes"]),
        f"\n## Scores\n\nVAE: PSNR {psnr:.1f} dB; the verifier passes {100 * passed:.1f} % of 500 reconstructions.\n"
        f"Base: the verifier's pass rate in percent, one picture a prompt, {STEPS} Euler steps, 360 prompts (60 a"
        " skill), with one standard error.\n",
        *score_table(models),
        TAIL.format(minutes=minutes),
    ]
    (DATA / "README.md").write_text("\n".join(text), encoding="utf-8")
