"""The model card of an export: how to load it, what was measured and how it was trained, as the run recorded it."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from flowbp_ray import __version__
from flowbp_ray.artifacts.card_phrases import (
    caution_of_distillation,
    describe_judge,
    describe_method,
    describe_penalty,
    describe_reading,
    describe_term,
    measured_only,
    ways_of_learning,
)
from flowbp_ray.artifacts.card_pictures import Prompts, Shown, evaluates_other_weights, gallery, known_prompts
from flowbp_ray.artifacts.card_use import Kind, base_name, use_elsewhere, use_in_diffusers
from flowbp_ray.artifacts.report import compare, table_rows
from flowbp_ray.backbones import Backbone
from flowbp_ray.backbones.guidance import one_branch
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.evaluation.evaluator import Evaluator
from flowbp_ray.run.folder import Run

RELATION = {"lora": "adapter", "full": "finetune", "merged": "finetune"}


def model_card(
    run: Run,
    backbone: Backbone,
    kind: Kind,
    step: int,
    average: bool,
    digest: str,
    form: str = "diffusers",
    shown: Sequence[Shown] = (),
    base_model: str | None = None,
) -> str:
    """Markdown with YAML front matter. digest: of the trained weights that were exported (`utils.digest.digest`).

    form: see `formats.Format`. shown: pictures that lie beside the card. base_model: the base's name at the Hub, where
    the card is not to name the folder that it was read from.
    """
    config, known = run.config, known_prompts(run)
    base, name = base_model or base_name(backbone), run.folder.resolve().name
    evaluator = Evaluator(config, run, known[1] if known else [], offset=0)
    evaluator.load(run.checkpoints.evaluations(step))
    front = _front_matter(config, name, base, kind, _eval_results(evaluator, step, average), form, shown)
    what = {
        "lora": f"Low-rank adapters for the transformer of {base}",
        "full": f"The transformer of {base} with all weights trained",
        "merged": f"The transformer of {base} with low-rank adapters merged into it",
    }[kind]
    use = f"In this folder, with diffusers:\n\n```python\n{use_in_diffusers(config, backbone, kind, base_model)}\n```"
    sections = {
        "Use": use if form == "diffusers" else use_elsewhere(config, form, f"{name}.safetensors", base),
        "Pictures": gallery(shown),
        "Scores": _scores(evaluator, step, average),
        "Training": _table(
            training_rows(run, backbone, step, average, form) | {"sha256 of the trained weights": f"`{digest}`"}
        ),
        "Data": _data(config, run, known),
        "Limits": _limits(config) + _quantised(config, kind),
    }
    intro = f"{what}, post-trained by {' and '.join(ways_of_learning(config))} with flowbp_ray {__version__}."
    head = f"---\n{front.to_yaml()}\n---\n# {name}\n\n{intro}\n"
    return head + "".join(f"\n## {title}\n{text}\n" for title, text in sections.items() if text)


def _front_matter(
    config: RunConfig,
    name: str,
    base: str,
    kind: Kind,
    results: list[EvalResult],
    form: str,
    shown: Sequence[Shown],
) -> ModelCardData:
    """What the Hub reads of a card; with results it shows a table of them, with pictures a gallery."""
    ways = [way.lower().replace(" ", "-") for way in ways_of_learning(config)]
    tags = ["flowbp_ray", "text-to-image", "flow-matching", *ways]
    # without results the key `model_name` would stand in the card by itself
    measured: dict[str, Any] = {"model_name": name, "eval_results": results} if results else {}
    if shown:
        measured["widget"] = [{"text": one.prompt, "output": {"url": one.file}} for one in shown]
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=base,
        base_model_relation=RELATION[kind],
        tags=tags + (["lora"] if kind == "lora" else []) + ([form] if form != "diffusers" else []),
        **measured,
    )


def _eval_results(evaluator: Evaluator, step: int, average: bool) -> list[EvalResult]:
    """What was measured of the exported weights, by guidance and metric; nothing where it was of other weights."""
    config = evaluator.config
    if step == 0 or step not in evaluator.results or evaluates_other_weights(config, average):
        return []
    prompts, trained = str(config.evaluation.prompts), config.trained_on
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type=prompts,
            dataset_name=prompts,
            metric_type=metric,
            metric_name=f"{metric}{' (trained on)' if metric in trained else ''}, guidance {guidance:g}",
            metric_args={"guidance": guidance},
            metric_value=value,
        )
        for guidance, evaluation in evaluator.results[step].items()
        for metric, value in evaluation.means().items()
        if value is not None and isfinite(value)
    ]


def _scores(evaluator: Evaluator, step: int, average: bool) -> str:
    """Before → after by guidance, from the evaluations that the checkpoint holds."""
    config = evaluator.config
    if not evaluator.results or max(evaluator.results) == 0:
        return "Not measured: the run made no evaluation between its first step and this checkpoint."
    first, last = min(evaluator.results), max(evaluator.results)
    settings, trained = config.evaluation, config.trained_on
    notes = [
        f"Means over the prompts of `{settings.prompts}` before step {first + 1} and after step {last}, with the same "
        f"noise, {settings.num_steps or config.backbone.num_steps} sampling steps; 95 % intervals, the change paired."
    ]
    if last != step:
        notes.append(f"**They are of step {last}, not of the exported weights: step {step} was not evaluated.**")
    if evaluates_other_weights(config, average):
        notes.append("**The run evaluates the average of its weights; exported are the weights themselves.**")
    if caution := caution_of_distillation(config):
        notes.append(f"**{caution}**")
    tables = []
    for guidance, after in evaluator.results[last].items():
        if before := evaluator.results[first].get(guidance):
            lines = [f"| guidance {guidance:g} | before | after | change |", "|---|---|---|---|"]
            for name, *numbers in table_rows(compare(before, after)):
                lines.append(f"| {name}{' (trained on)' if name in trained else ''} | {' | '.join(numbers)} |")
            tables.append("\n".join(lines))
    return "\n\n".join([" ".join(notes), *tables])


def training_rows(
    run: Run, backbone: Backbone | None, step: int, average: bool, form: str = "diffusers"
) -> dict[str, str]:
    """The rows of a table of the configuration, by name, for weights after `step` steps or their average.

    backbone: None where the folder of the base is not on this machine; then what only it knows is left out.
    """
    config = run.config
    model, learners, optimizer = config.backbone, config.learners, config.learners.optimizer
    lora, batch = learners.lora, config.data.shape.batch
    lines = [line for line in run.metrics() if line["kind"] == "train" and line["step"] < step]
    unchanged = sum(line["updated"] == 0 for line in lines)
    changed = f"; {unchanged} of them changed nothing" if unchanged else ""
    averaged = f"their average (decay {learners.ema.decay:g})" if average and learners.ema else "as trained"
    jitter, limit = config.rewards.jitter, config.drift.max
    backpropagated = bool(config.rewards.differentiable)
    drift = "drift not limited" if limit is None else f"samples of drift above {limit:g} masked"
    negative = {}
    if backbone is not None:
        branch = "detached" if model.detach_negative else "differentiated"
        used = backpropagated and not one_branch(backbone, model.guidance)
        negative = {"negative branch": branch if used else "none"}
    base = str(model.path) if backbone is None else base_name(backbone)
    scaled = ""
    if lora is not None and form == "diffusers":
        scaled = f" (the file has alpha {lora.rank}, with the scale {lora.alpha / lora.rank:g} in lora_B)"
    targets = backbone.lora_targets if backbone is not None else ["the layers that the family names"]
    return {
        "base": f"{base}, family `{model.name}`{_held(config)}",
        "steps": f"{step} of {config.steps}, {batch} images each{changed}",
        "weights": f"{averaged}, {model.dtype}",
        "trained": "all weights of the transformer"
        if lora is None
        else f"adapters of rank {lora.rank}, alpha {lora.alpha}{scaled}, on {', '.join(lora.targets or targets)}",
        "method": describe_method(config.method),
        "method as a value": f"`{config.surrogate()}`",
        "rewards": "; ".join(describe_term(config, term) for term in config.rewards.terms),
        "jitter of what they saw": f"noise up to {jitter.noise:g}, shifts up to {jitter.shift} pixels"
        if backpropagated
        else "none",
        "distance to the base": describe_penalty(config),
        "measured only": ", ".join(measured_only(config)) or "nothing",
        "judges": "; ".join(describe_judge(judge) for judge in config.judges) or "none",
        "sampling": f"{model.height}x{model.width} pixels, {model.num_steps} steps, sigmas {model.sigmas}, guidance "
        f"{model.guidance:g}",
        "staleness": f"{config.staleness}; {drift}",
        **negative,
        "optimizer": f"AdamW, learning rate {optimizer.lr:g}, betas {optimizer.betas[0]:g} and {optimizer.betas[1]:g}, "
        f"weight decay {optimizer.weight_decay:g}, gradient norm at most {optimizer.max_grad_norm:g}",
        "schedule": f"{optimizer.schedule.name}, {optimizer.schedule.warmup} steps of warm-up",
        "seeds": f"{config.seed} (prompts, noise), {config.plan_seed} (plans)",
        "everything else": "`flowbp_ray.yaml`, which `flowbp-ray train` takes again",
    }


def _held(config: RunConfig) -> str:
    kind = config.backbone.quantization
    return f", held in {kind} while it was trained over" if kind else ""


def _quantised(config: RunConfig, kind: Kind) -> str:
    """What an export says of a base that training held in fewer bits than the code above loads."""
    held = config.backbone.quantization
    if held is None:
        return ""
    how = "merged into" if kind == "merged" else "used over"
    same = ""
    if held == "nf4" and kind == "lora":
        same = (
            "; to draw over the base of training, on a GPU with bitsandbytes, load the transformer with diffusers' "
            '`BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
            f"bnb_4bit_compute_dtype={config.backbone.torch_dtype})`"
        )
    return (
        f" The adapters were trained and measured over the base in {held}; {how} the base in {config.backbone.dtype} "
        f"pictures differ by the rounding of its weights{same}."
    )


def _data(config: RunConfig, run: Run, known: Prompts | None) -> str:
    """Where the prompts came from, how many there are, and the digest that the run was bound to."""
    file = run.folder / "prompts.sha256"
    gone = "not known: the file is gone or has changed since"
    entries = {
        "prompts": f"`{config.data.prompts}`",
        "number of prompts": str(len(known[0])) if known else gone,
        "per step": f"{config.data.prompts_per_step} prompts, {config.data.images_per_prompt} images of each",
        "evaluated on": f"`{config.evaluation.prompts}`" if config.evaluation.prompts else "nothing",
    }
    if config.evaluation.prompts:
        entries["number evaluated on"] = str(len(known[1])) if known else gone
    entries |= describe_reading(config)
    entries["sha256 of all prompts"] = f"`{file.read_text().strip()}`" if file.is_file() else "not recorded"
    return "There are no training pictures: the model is trained on its own samples.\n\n" + _table(entries)


def _limits(config: RunConfig) -> str:
    """What the numbers of the card do not say."""
    monitors = ", ".join(measured_only(config))
    others = f"what was measured only ({monitors})" if monitors else "another reward or by eye"
    return (
        f"Training pushes its own rewards up, if need be by deceiving them: judge by {others}. Only what stands "
        "above was measured, no other prompts, sizes, guidance or step counts, no safety, no bias. What the "
        "base cannot do, and its licence, apply here too; this card grants no licence."
    )


def _table(entries: dict[str, str]) -> str:
    lines = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in entries.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
