"""A quantised base against closed forms, diffusers' own layers, and a dense model with the dequantised weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flowbp_ray.artifacts.export import export
from flowbp_ray.backbones.frozen import load_base
from flowbp_ray.backbones.guidance import trained_velocity
from flowbp_ray.backbones.quantised import QuantisedLinear, quantise, quantised_bytes
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.learning.learner import build_learner
from flowbp_ray.local import LocalLoop, encode
from flowbp_ray.planning import memory
from flowbp_ray.planning.base import base_bytes
from flowbp_ray.planning.costs import Costs
from flowbp_ray.weights import trainable
from tests.artifacts.exporting import trained_run
from tests.backbones import tiny
from tests.backbones.families import PROMPTS, run_config
from tests.conftest import Saved
from tests.planning.common import peak_of

KINDS = ("int8", "nf4")
LEVELS = torch.tensor(  # NF4's 16 values, QLoRA (arXiv 2305.14314), appendix E
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip
LORA = "learners.lora={rank: 4, alpha: 8}"


def over(saved: Saved, tmp_path: Path, name: str, kind: str, *more: str) -> RunConfig:
    return run_config(name, saved(name)[0], tmp_path, "flowbp_bridge", f"backbone.quantization={kind}", LORA, *more)


def layer(dtype: torch.dtype = torch.float32, rows: int = 48, columns: int = 96) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows).to(dtype).requires_grad_(False)


def test_int8_is_the_nearest_of_255_values_of_a_row() -> None:
    dense = layer()
    most = dense.weight.half().abs().amax(1, keepdim=True).float()
    want = (dense.weight.half() * (127.0 / most)).round() * most / 127
    torch.testing.assert_close(QuantisedLinear(dense, "int8", "cpu").dense(), want, rtol=1e-6, atol=0)
    dense.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"above 65504; write backbone\.quantization=nf4"):
        QuantisedLinear(dense, "int8", "cpu")


def test_nf4_is_the_nearest_of_16_values_of_a_block() -> None:
    dense = layer()
    blocks = dense.weight.reshape(-1, 64)
    most = blocks.abs().amax(1, keepdim=True)
    nearest = LEVELS[(blocks[..., None] / most[..., None] - LEVELS).abs().argmin(-1)]
    want = (nearest * most).reshape(dense.weight.shape)
    torch.testing.assert_close(QuantisedLinear(dense, "nf4", "cpu").dense(), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_linear_in_its_dequantised_weight_and_keeps_no_dense_copy(kind: Any, dtype: torch.dtype) -> None:
    """Output and gradient bit for bit, with or without gradient; casting a module changes neither codes nor scales."""
    dense = layer(dtype)
    own, twin = QuantisedLinear(dense, kind, "cpu"), copy.deepcopy(dense)
    twin.weight.data = own.dense()
    x = torch.randn(3, 5, 96).to(dtype).requires_grad_()
    gradient = torch.randn(3, 5, 48).to(dtype)
    found, want = ((y, *torch.autograd.grad(y, x, gradient)) for y in (own(x), twin(x)))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    with torch.no_grad():
        assert torch.equal(own(x), want[0])
    cast = copy.deepcopy(own).bfloat16().float()
    assert torch.equal(cast.codes, own.codes) and torch.equal(cast.scales, own.scales)
    assert own.codes.nbytes + own.scales.nbytes == quantised_bytes(dense.weight.shape, kind)
    assert set(own.state_dict()) == {"weight", "bias"} and own.weight.numel() == 0
    wide = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(8))).requires_grad_(False)
    quantise(wide, kind)
    y = torch.randn(1, 512, requires_grad=True)
    wide(y)  # what is made once stays out
    assert peak_of(lambda: wide(y).sum().backward()) < 2.5 * 4 * 512 * 512


@pytest.mark.parametrize("name", tiny.NAMES)
def test_nf4_is_what_diffusers_loads(saved: Saved, tmp_path: Path, name: str) -> None:
    """Its own replacement of layers (the part of `from_pretrained` that needs no GPU), quantised by bitsandbytes."""
    from bitsandbytes.functional import dequantize_4bit
    from diffusers import BitsAndBytesConfig
    from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear

    config = over(saved, tmp_path, name, "nf4")
    backbone = encoder_free(config)
    ours = load_base(backbone, config.backbone, "cpu")
    dense = backbone.load_transformer(torch.float32)
    state = dense.state_dict()
    theirs: Any = replace_with_bnb_linear(
        dense, [], quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    found = {key: m for key, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"}
    own = {key: m for key, m in ours.named_modules() if isinstance(m, QuantisedLinear)}
    assert own.keys() == found.keys() and len(own) > 10
    for key, module in found.items():
        loaded = type(module.weight)(state[f"{key}.weight"], requires_grad=False, **module.weight.__dict__).to("cpu")
        shape, loaded.quant_state.shape = loaded.quant_state.shape, (1, loaded.quant_state.shape.numel())
        # as one row: with AVX-512 its kernel is wrong where a block goes on in the next row (rows of no multiple of 64)
        assert torch.equal(own[key].dense(), dequantize_4bit(loaded.data, loaded.quant_state).reshape(shape))
        if own[key].bias is not None:
            assert torch.equal(own[key].bias, state[f"{key}.bias"])


def encoder_free(config: RunConfig) -> Any:
    from flowbp_ray.backbones.registry import build_backbone

    return build_backbone(config.backbone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", tiny.NAMES)
def test_adapters_get_the_gradient_of_the_dequantised_model(saved: Saved, tmp_path: Path, name: str, kind: str) -> None:
    """Velocity, the gradient at the state and all adapters' gradients, against dense layers under autograd."""
    config = over(saved, tmp_path, name, kind, "backbone.guidance=2", "backbone.detach_negative=false")
    backbone, model = encoder_free(config), config.backbone
    embeddings, sigmas = encode(config, PROMPTS[:2]), backbone.sigmas(4, 64, 64)
    quantised, twin = load_base(backbone, model, "cpu"), backbone.load_transformer(torch.float32)
    for key, module in quantised.named_modules():
        if isinstance(module, QuantisedLinear):
            twin.get_submodule(key).weight.data = module.dense()
    found = []
    for transformer in (quantised, twin):
        trainable.prepare(transformer, config.learners.lora, 1, backbone.lora_targets)
        generator = torch.Generator().manual_seed(2)
        for p in trainable.trained(transformer).values():  # peft's second factor begins at zero
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
        if transformer is quantised:
            transformer.enable_gradient_checkpointing()
        transformer.train()
        bound = (embeddings.rows([0, 1]), embeddings.negative(2), 2.0, False)
        x = torch.randn(2, *backbone.latent_shape(64, 64), generator=generator).requires_grad_()
        v = trained_velocity(backbone, transformer, sigmas, *bound)(x, torch.tensor([1, 2]), torch.arange(2))
        v.backward(torch.randn(v.shape, generator=generator))
        found.append((v, x.grad, trainable.trained(transformer)))
    assert found[0][2].keys() == found[1][2].keys()
    pairs = [found[0][:2], found[1][:2]]
    for a, b in [*zip(*pairs, strict=True), *((found[0][2][k].grad, found[1][2][k].grad) for k in found[0][2])]:
        if a is None or b is None:  # adapters of a last block that nothing reads
            assert a is b
        else:  # where some gradients are exactly zero
            assert float((a - b).norm()) <= 1e-5 * float(b.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_samplers_and_learners_hold_the_same_and_a_restored_run_goes_on(
    saved: Saved, tmp_path: Path, kind: str, dtype: str
) -> None:
    more = [f"backbone.dtype={dtype}", "drift.meter=true", "learners.base_penalty={weight: 1.0}", "steps=2"]
    config = over(saved, tmp_path, "flux1", kind, *more)
    loop = LocalLoop(config)
    bases = [dict(m.named_buffers()) for m in (loop.sampler.transformer, loop.learner.engine.module)]
    assert bases[0].keys() == bases[1].keys() and any(key.endswith("codes") for key in bases[0])
    assert all(torch.equal(bases[0][key], bases[1][key]) for key in bases[0])
    assert {p.dtype for p in loop.learner.engine.module.parameters()} == {config.backbone.torch_dtype}
    report = loop.step(0)
    assert report.grad_norm > 0 and max(report.drift) < (1e-6 if dtype == "float32" else 1e-2)
    assert max(report.base_distance) < (1e-10 if dtype == "float32" else 1e-4)  # the adapters are off there
    loop.learner.save(str(tmp_path / "saved"))
    written = sum(path.stat().st_size for path in (tmp_path / "saved" / "engine").iterdir())
    assert written < 20 * sum(loop.learner.engine.sizes().values()) + 2**16
    loop.step(1)
    again = LocalLoop(config)
    again.learner = build_learner(config, encode(config, again.texts))
    again.learner.load(str(tmp_path / "saved"))
    again.step(1)
    assert again.learner.digest() == loop.learner.digest()


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_planned_as_they_are_held(saved: Saved, tmp_path: Path, kind: str) -> None:
    for name in tiny.NAMES:
        config = over(saved, tmp_path, name, kind, "backbone.dtype=bfloat16")
        sizes = memory.Sizes.of(config, Costs(config))
        backbone = encoder_free(config)
        module = load_base(backbone, config.backbone, "cpu")
        trainable.prepare(module, config.learners.lora, 0, backbone.lora_targets)
        held = {t.data_ptr(): t.nbytes for t in [*module.parameters(), *module.buffers()] if t.numel()}
        fixed = {t.data_ptr(): t.nbytes for t in backbone.load_transformer(torch.bfloat16).buffers()}
        assert sizes.linears is not None
        planned = base_bytes(config.backbone, sizes.transformer, sizes.linears)
        assert planned == sum(held.values()) - sum(fixed.values()) + 2 * sizes.linears.largest
        [weights] = [s for s in memory.samplers(config, Costs(config), sizes).shares if s.name == "weights"]
        assert weights.nbytes == planned < 2 * sizes.transformer


def test_exported_adapters_are_exact_and_merged_ones_are_in_the_dense_base(saved: Saved, tmp_path: Path) -> None:
    config = over(saved, tmp_path, "flux1", "nf4")
    folder, pipe = saved("flux1")
    run = trained_run(config)
    export(run, tmp_path / "adapters")
    export(run, tmp_path / "merged", merge=True)
    _, published = run.checkpoints.weights()
    loaded = type(pipe).from_pretrained(folder)
    loaded.load_lora_weights(tmp_path / "adapters")
    named = {n.replace("default_0", "default"): p for n, p in loaded.transformer.named_parameters() if "lora_" in n}
    assert named.keys() == published.keys()
    scales = {key: 2 if ".lora_B." in key else 1 for key in published}  # alpha / rank is in the file's tensors
    assert all(torch.equal(named[key], tensor * scales[key]) for key, tensor in published.items())
    merged = load_file(tmp_path / "merged" / "transformer" / "diffusion_pytorch_model.safetensors")
    base = pipe.transformer.state_dict()
    assert merged.keys() == base.keys()
    for low in (key for key in published if ".lora_A." in key):
        module, up = low.split(".lora_A.")[0], low.replace("lora_A", "lora_B")
        want: Tensor = base[f"{module}.weight"] + 8 / 4 * published[up] @ published[low]
        torch.testing.assert_close(merged[f"{module}.weight"], want)
    cards = [(tmp_path / kind / "README.md").read_text() for kind in ("adapters", "merged")]
    assert all("over the base in nf4" in card and "held in nf4" in card for card in cards)
    assert 'bnb_4bit_quant_type="nf4"' in cards[0] and "bnb_4bit" not in cards[1]


def test_what_cannot_be_quantised_is_refused(saved: Saved, tmp_path: Path) -> None:
    start = ["backbone.quantization=int8"]
    with pytest.raises(ValueError, match=r"quantization=int8 freezes the base.*learners\.lora=\{rank: 16\}"):
        run_config("flux1", saved("flux1")[0], tmp_path, "flowbp_bridge", *start)
    with pytest.raises(ValueError, match=r"quantization=int8 cannot be sharded by .*write learners\.zero=2"):
        run_config("flux1", saved("flux1")[0], tmp_path, "flowbp_bridge", *start, LORA, "learners.engine=deepspeed",
                   "learners.zero=3")  # fmt: skip
    with pytest.raises(ValueError, match="no linear layer to quantise in nf4"):
        quantise(nn.Sequential(nn.GELU()), "nf4")
