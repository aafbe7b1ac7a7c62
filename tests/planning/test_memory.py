"""Parameters, activations and the engine's state against published sizes and real allocations on the CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.meters import SavedBytes
from benchmarks.sizes import SIZES
from flowbp_ray.backbones.base import unit_images
from flowbp_ray.backbones.registry import backbone_named
from flowbp_ray.config import loading
from flowbp_ray.learning.engine import TorchEngine
from flowbp_ray.planning import learner_memory, memory
from flowbp_ray.planning.costs import Costs
from flowbp_ray.run.engine_state import bytes_of
from flowbp_ray.weights import buckets, trainable
from tests.backbones import tiny
from tests.paths import DATA
from tests.planning.common import CLOSE, backward, config_of, peak_of, real_node, write

PUBLISHED = json.loads((DATA / "model_configs.json").read_text())
FAMILY = {"SD3Transformer2DModel": "sd35", "FluxTransformer2DModel": "flux1", "Flux2Transformer2DModel": "flux2"}
VAE = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16, "layers_per_block": 2}


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "comment"])
def test_published_models_have_their_published_parameters(name: str, tmp_path: Path) -> None:
    entry = PUBLISHED[name]
    write(tmp_path, "transformer", entry["config"] | {"_class_name": entry["class"]})
    write(tmp_path, "vae", VAE | {"_class_name": "AutoencoderKLFlux2" if "FLUX.2" in name else "AutoencoderKL"})
    config = loading.load(f"{FAMILY[entry['class']]}_flowbp_sparse", [f"backbone.path={tmp_path}"])
    sizes = memory.Sizes.of(config, Costs(config))
    assert sizes.transformer == sizes.trained == entry["parameters"]
    if FAMILY[entry["class"]] != "sd35":
        return
    adapted = loading.load(f"{FAMILY[entry['class']]}_refl", [f"backbone.path={tmp_path}", "learners.lora.rank=4"])
    lora = memory.Sizes.of(adapted, Costs(adapted))
    assert lora.transformer - lora.trained == entry["parameters"] and 0 < lora.trained < entry["parameters"] / 100


@pytest.mark.parametrize("name", tiny.NAMES)
def test_all_parts_are_counted_as_they_load(name: str, folders: Any) -> None:
    whole, bare = folders(name)
    config = config_of(name, bare)
    sizes, real = memory.Sizes.of(config, Costs(config)), backbone_named(name, str(whole))
    assert sizes.transformer == memory.elements(real.load_transformer(torch.float32))
    assert sizes.vae == memory.elements(real.load_vae())
    pipe = real.text_pipeline()
    loaded = {part: getattr(pipe, part) for part in real.encoder_classes}
    assert sizes.encoders == {part: memory.elements(encoder) for part, encoder in loaded.items()}
    assert sizes.encoder_bytes == sum(p.nbytes for encoder in loaded.values() for p in encoder.parameters())


def test_the_conditioning_is_as_long_as_encoded(folders: Any) -> None:
    for name in ("sd35", "flux1", "flux2"):  # Qwen-Image's is as long as the prompt; there the longest is planned
        real = backbone_named(name, str(folders(name)[0]))
        encoded, planned = real.load_encoder()(["a red circle"]), real.conditioning_skeleton()
        assert {key: (t.shape, t.dtype) for key, t in encoded.items()} == {
            key: (t.shape, t.dtype) for key, t in planned.items()
        }


VARIANTS: dict[str, list[str]] = {
    "full": ["learners.gradient_checkpointing=false"],
    "full, checkpointed": ["learners.gradient_checkpointing=true"],
    "lora": ["learners.gradient_checkpointing=false", "learners.lora.rank=4"],
    "lora, checkpointed": ["learners.gradient_checkpointing=true", "learners.lora.rank=4"],
    "negative branch": ["learners.gradient_checkpointing=false", "backbone.detach_negative=false"],
    "bf16": ["learners.gradient_checkpointing=false", "backbone.dtype=bfloat16"],
}
SHORT = {
    ("flux1", "full"),
    ("flux2", "lora, checkpointed"),
    ("qwen_image", "full, checkpointed"),
    ("qwen_image", "lora"),
}
SHORT |= {("sd35", variant) for variant in VARIANTS} | {("14 M", "full"), ("14 M", "full, checkpointed")}
NODES = [
    pytest.param(name, variant, id=f"{name}, {variant}", marks=[] if (name, variant) in SHORT else [pytest.mark.long])
    for name in (*tiny.NAMES, "14 M")  # bf16 not at tiny sizes, where the CPU's kernels need more than the model
    for variant in VARIANTS
    if variant != "bf16" or name == "14 M"
]


@pytest.mark.parametrize(("name", "variant"), NODES)
def test_activations_are_those_of_a_measured_node(name: str, variant: str, folders: Any, tmp_path: Path) -> None:
    if name == "14 M":
        family, folder, module = "sd35", tmp_path, SD3Transformer2DModel(**SIZES["sd3-14m"].transformer)
        shutil.copytree(folders("sd35")[1], folder, dirs_exist_ok=True)
        module.save_config(folder / "transformer")
    else:
        family, (whole, folder) = name, folders(name)
        module = backbone_named(family, str(whole)).load_transformer(torch.float32)
    config = config_of(family, folder, *VARIANTS[variant])
    forward, module = real_node(config, module.to(config.backbone.torch_dtype))
    backward(forward)  # what is made once stays out
    predicted = Costs(config).node(config)
    assert predicted.peak == pytest.approx(peak_of(lambda: backward(forward)), rel=CLOSE)
    if not config.learners.gradient_checkpointing:  # whose own hooks hide what it saves from ours
        meter, kept = SavedBytes(), []
        meter.measure(lambda: kept.append(forward()))
        parameters = sum(p.nbytes for p in module.parameters() if meter.holders.get(p.data_ptr()))
        assert predicted.saved == pytest.approx(meter.live - parameters, rel=CLOSE)


def test_a_kernel_that_keeps_the_matrix_of_attention_is_planned_too(folders: Any) -> None:
    config = config_of("sd35", folders("sd35")[1], "learners.gradient_checkpointing=false")
    forward, _ = real_node(config, backbone_named("sd35", str(folders("sd35")[0])).load_transformer(torch.float32))
    with sdpa_kernel(SDPBackend.MATH):
        measured = peak_of(lambda: backward(forward))
        quadratic = Costs(config).node(config).peak
    assert quadratic == pytest.approx(measured, rel=CLOSE)
    assert quadratic > 1.5 * Costs(config).node(config).peak


VAES: dict[str, dict[str, Any]] = {
    "sd35": {"block_out_channels": [16, 32, 32, 32], "norm_num_groups": 8, "mid_block_add_attention": True},
    "flux2": {"block_out_channels": [16, 32, 32, 32], "norm_num_groups": 8},
    "qwen_image": {"base_dim": 16},
    "shapes": {},
}


@pytest.mark.parametrize("name", VAES)
def test_the_decoder_is_a_measured_one(name: str, folders: Any, tmp_path: Path) -> None:
    """With channels for which the CPU's convolutions need no padding; those over time take room of their own."""
    if name == "shapes":
        config = loading.load("shapes_refl")
    else:
        shutil.copytree(folders(name)[1], tmp_path, dirs_exist_ok=True)
        write(tmp_path, "vae", json.loads((tmp_path / "vae" / "config.json").read_text()) | VAES[name])
        config = config_of(name, tmp_path)
    costs = Costs(config)
    kind = type(costs.backbone.vae_skeleton())
    vae = kind.from_config(costs.backbone.vae_skeleton().config).eval().requires_grad_(False)
    latents = torch.randn(3, *costs.latent_shape, requires_grad=True)
    latents.grad = torch.zeros_like(latents)

    def decode() -> Tensor:
        return unit_images(costs.backbone.decode(vae, latents))

    backward(decode)
    meter, kept = SavedBytes(), []
    meter.measure(lambda: kept.append(decode()))
    parameters = sum(p.nbytes for p in vae.parameters() if meter.holders.get(p.data_ptr()))
    assert costs.decoding(3, True).saved == pytest.approx(meter.live - parameters, rel=CLOSE)
    if name == "qwen_image":
        return
    assert costs.decoding(3, True).peak == pytest.approx(peak_of(lambda: backward(decode)), rel=CLOSE)
    with torch.no_grad():
        assert costs.decoding(3, False).peak == pytest.approx(peak_of(decode), rel=CLOSE)


@pytest.mark.parametrize(("stage", "formula"), [(1, 4 + 12 / 8), (2, 2 + 14 / 8), (3, 16 / 8)])
def test_zero_keeps_the_bytes_of_its_paper(stage: int, formula: float, folders: Any) -> None:
    """Mixed precision and Adam: 2 + 2 + 12 bytes a parameter, of which a stage shards 12, 14 or all (1910.02054)."""
    config = config_of("sd35", folders("sd35")[1], "backbone.dtype=bfloat16", f"learners.zero={stage}")
    sizes = memory.Sizes(8 * 10**9, 8 * 10**9, 0, {}, 0)
    state = ("weights", "optimizer: fp32 masters", "optimizer: moments", "gradients")
    held = sum(s.nbytes for s in learner_memory.deepspeed_shares(config, sizes) if s.name in state and not s.phase)
    assert config.learners.count == 8 and held == formula * sizes.transformer


def test_an_offloaded_optimizer_leaves_12_bytes_a_trained_parameter_to_the_host(folders: Any) -> None:
    """ZeRO-2 on 8 ranks: masters and two moments, each its eighth; weights and gradients stay on the GPU."""
    sizes = memory.Sizes(8 * 10**9, 8 * 10**9, 0, {}, 0)
    shared = ("sd35", folders("sd35")[1], "backbone.dtype=bfloat16", "learners.ema=null")
    here, away = (
        learner_memory.deepspeed_shares(config_of(*shared, f"learners.offload={word}"), sizes)
        for word in ("false", "true")
    )
    always = {place: sum(s.nbytes for s in away if s.place == place and not s.phase) for place in ("device", "host")}
    assert always["host"] == 12 * 10**9
    assert sum(always.values()) == sum(s.nbytes for s in here if not s.phase)
    assert {s.name for s in away if s.place == "device" and s.phase == "optimizer"} == set()


@pytest.mark.parametrize("count", [4, 8])
def test_stage_3_is_sharded_before_there_is_any_state(count: int, folders: Any) -> None:
    """FLUX.1's 11.9 B on `count` ranks. Building holds whole weights only; a running rank 20 bytes of its shard (bf16
    weights and gradients, masters, two moments, the average) and the optimizer's share."""
    config = config_of("sd35", folders("sd35")[1], "backbone.dtype=bfloat16", "learners.zero=3")
    config = config.model_copy(update={"learners": config.learners.model_copy(update={"count": count})})
    t, live = 11_901_408_320, 10**9
    shares = learner_memory.deepspeed_shares(config, memory.Sizes(t, t, 0, {}, 0, largest=10**7))
    role = memory.role("learners", config.learners, shares)
    assert role.held("building") == 2 * t
    assert role.held("") == 20 * t // count + 500_000_000 * 2
    assert role.held("optimizer") == role.held("") + 4 * live * (1 if config.learners.gpus else 2)
    assert role.fullest == "optimizer"


@pytest.mark.parametrize(("stage", "copies"), [(0, 0), (1, 1), (2, 1), (3, 2)])
def test_publishing_takes_a_bucket_and_not_the_whole(stage: int, copies: int, folders: Any) -> None:
    """The average is cast a bucket at a time, and stage 3 gathers one; stage 0 publishes what is there."""
    dtype = "bfloat16" if stage else "float32"
    config = config_of("sd35", folders("sd35")[1], f"backbone.dtype={dtype}", f"learners.zero={stage}")
    assert config.learners.ema is not None
    sizes = memory.Sizes(8 * 10**9, 8 * 10**9, 0, {}, 0, largest=10**7)
    held = [s.nbytes for s in learner_memory.deepspeed_shares(config, sizes) if s.phase == "publishing"]
    assert max(held, default=0) == copies * buckets.BUCKET
    if not stage:
        return
    large = memory.Sizes(8 * 10**9, 8 * 10**9, 0, {}, 0, largest=10**9)
    assert learner_memory.bucket_bytes(config, large) == 2 * 10**9  # a tensor is never cut
    few = memory.Sizes(8 * 10**9, 8 * 10**6, 0, {}, 0, largest=10)
    assert learner_memory.bucket_bytes(config, few) == 2 * 10**6  # each of 8 ranks its share


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("extra", [[], ["learners.lora.rank=4"]], ids=["full", "lora"])
def test_the_plain_engine_holds_what_is_planned(dtype: str, extra: list[str], folders: Any) -> None:
    whole, bare = folders("flux1")
    overrides = [f"backbone.dtype={dtype}", "learners.engine=torch", "learners.count=1", *extra]
    config = config_of("flux1", bare, *overrides)
    assert config.learners.ema is not None
    sizes = memory.Sizes.of(config, Costs(config))
    module = backbone_named("flux1", str(whole)).load_transformer(config.backbone.torch_dtype)
    trainable.prepare(module, config.learners.lora, 0, backbone_named("flux1", str(whole)).lora_targets)
    engine = TorchEngine(module, config.learners)
    for p in engine.named.values():
        p.grad = torch.ones_like(p)
    gradients = sum(p.nbytes for p in engine.named.values())
    engine.step(1e-4)
    assert engine.ema is not None
    moments = [t for s in engine.optimizer.state.values() for t in s.values() if t.dim()]
    storages = {t.data_ptr(): t.nbytes for t in [*module.parameters(), *engine.masters.values()]}
    really = sum(storages.values()) + gradients + sum(t.nbytes for t in [*moments, *engine.ema.average])
    assert sum(s.nbytes for s in learner_memory.torch_shares(config, sizes) if s.phase in ("", "backward")) == really


def test_versions_that_wait_for_their_items_are_counted(folders: Any) -> None:
    """With staleness S samplers hold S versions more, and rank 0 keeps S + 1 on the host."""
    folder = folders("sd35")[1]
    config = config_of("sd35", folder)
    costs = Costs(config)
    sizes = memory.Sizes.of(config, costs)

    def held(role: str, *overrides: str) -> dict[str, tuple[int, str]]:
        of_role = memory.samplers if role == "samplers" else learner_memory.learners
        found = of_role(config_of("sd35", folder, *overrides), costs, sizes)
        return {share.name: (share.nbytes, share.place) for share in found.shares}

    update = sizes.trained * 4
    sent = ["cluster.transport=nccl", "samplers.gpus=1", "learners.gpus=1"]
    late = [*sent, "staleness=2", "drift.max=0.1"]
    assert held("samplers", *late)["versions received ahead"] == (2 * update, "device")
    assert held("learners", *late)["copies of versions"] == (3 * update, "host")
    for overrides in (sent, [*late, "cluster.transport=object_store"]):
        names = {*held("samplers", *overrides), *held("learners", *overrides)}
        assert not names & {"versions received ahead", "copies of versions"}


@pytest.mark.parametrize(
    "more", [[], ["learners.ema.decay=0.9"], ["learners.lora={rank: 4}", "learners.ema.decay=0.9"]]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_copies_while_a_checkpoint_is_written(folders: Any, more: list[str], dtype: str) -> None:
    """The bytes of what an engine gives to be saved, after a step in which every parameter had a gradient."""
    whole, _ = folders("sd35")
    config = config_of("sd35", whole, f"backbone.dtype={dtype}", *more)
    real = backbone_named("sd35", str(whole))
    loaded = real.load_transformer(config.backbone.torch_dtype)
    module = trainable.prepare(loaded, config.learners.lora, 0, real.lora_targets)
    engine = TorchEngine(module, config.learners)
    for p in trainable.trained(module).values():
        p.grad = torch.zeros_like(p)
    engine.step(1e-3)
    sizes = memory.Sizes.of(config, Costs(config))
    assert learner_memory.state_bytes(config, sizes.trained) == bytes_of(engine.fragments())
