"""Compiled blocks and other attention kernels compute what the plain model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import diffusers
import pytest
import torch
from torch import Tensor

from flowbp_ray.backbones import encode_all
from flowbp_ray.backbones.guidance import full_velocity
from flowbp_ray.backbones.kernels import keep_own_code, repeated_blocks, use_kernels
from flowbp_ray.backbones.registry import backbone_named
from flowbp_ray.config.learners import LoraConfig
from flowbp_ray.config.sections import Attention
from flowbp_ray.local import LocalLoop
from flowbp_ray.preflight import check
from flowbp_ray.weights import trainable
from flowbp_ray.weights.packing import merge_tensors
from tests.backbones import tiny
from tests.conftest import Saved
from tests.small import small_config

SIZE = (32, 48)


def loaded(name: str, saved: Saved) -> Any:
    backbone = backbone_named(name, str(saved(name)[0]))
    return backbone, encode_all(backbone.load_encoder(), ["a red circle", "two blue squares"])


@pytest.fixture(params=tiny.NAMES)
def model(request: pytest.FixtureRequest, saved: Saved) -> Any:
    return loaded(request.param, saved)


def velocity_and_gradient(model: Any, transformer: Any, rows: int) -> tuple[Tensor, Tensor]:
    """v [rows, ...] with two branches, and the gradient of |v|² at all weights in one vector."""
    backbone, table = model
    ids = [i % 2 for i in range(rows)]
    x = torch.randn(rows, *backbone.latent_shape(*SIZE), generator=torch.Generator().manual_seed(rows))
    sigmas = backbone.sigmas(4, *SIZE)
    bound = full_velocity(backbone, transformer, sigmas, table.rows(ids), table.negative(rows), 3.0)
    transformer.zero_grad(set_to_none=True)
    v = bound(x, torch.full((rows,), 1), torch.arange(rows))
    v.square().sum().backward()
    # A weight of Qwen-Image's last block that nothing needs has no gradient, or zeros once it is compiled.
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in transformer.parameters()]
    return v.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def assert_equal(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape and float((a - b).norm() / b.norm()) < 1e-5


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        pytest.param(name, flag, marks=[] if (name, flag) == ("sd35", True) else pytest.mark.long)
        for name in tiny.NAMES
        for flag in (True, False)
    ],
)
def test_compiled_blocks_compute_the_same_with_one_graph_for_all_rows(
    name: str, checkpointing: bool, saved: Saved
) -> None:
    """The graphs are counted by torch; its own autograd runs them, so that only what is traced differs."""
    from torch._dynamo import reset
    from torch._dynamo.testing import CompileCounterWithBackend

    model = loaded(name, saved)
    transformer: Any = model[0].load_transformer(torch.float32).train()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    wanted = {rows: velocity_and_gradient(model, transformer, rows) for rows in (2, 3, 5)}
    reset()
    counter, graphs = CompileCounterWithBackend("aot_eager"), []
    for block in repeated_blocks(transformer):
        block.compile(dynamic=True, backend=counter)
    for rows, expected in wanted.items():
        assert_equal(velocity_and_gradient(model, transformer, rows), expected)
        graphs.append(counter.frame_count)
    assert graphs[0] > 0 and graphs == graphs[:1] * len(graphs), "another number of rows was compiled again"
    reset()


@pytest.mark.long
@torch.no_grad()
def test_no_variant_of_a_block_is_left_to_plain_torch(saved: Saved) -> None:
    """SD3.5's kinds of blocks, one row and several, with and without gradient, adapters on and off."""
    from torch._dynamo import config as dynamo
    from torch._dynamo import reset

    backbone, table = loaded("sd35", saved)
    config = {**backbone.transformer_config, "num_layers": 5, "dual_attention_layers": (0, 1)}
    transformer: Any = diffusers.SD3Transformer2DModel.from_config(config)
    trainable.prepare(transformer, LoraConfig(rank=4), 0, backbone.lora_targets)
    reset()
    use_kernels(transformer, "blocks", None)
    for block in repeated_blocks(transformer):
        block.compile(dynamic=True, backend="eager")
    sigmas = backbone.sigmas(4, *SIZE)
    with dynamo.patch(fail_on_recompile_limit_hit=True):
        for rows in (1, 4):
            x = torch.zeros(rows, *backbone.latent_shape(*SIZE))
            at = torch.full((rows,), 1), torch.arange(rows)
            bound = full_velocity(backbone, transformer, sigmas, table.rows([0] * rows), table.negative(rows), 1.0)
            for gradient in (True, False):
                with torch.set_grad_enabled(gradient):
                    bound(x, *at)
                    with trainable.adapters_off(transformer):
                        bound(x, *at)
    reset()


@pytest.mark.long
def test_the_key_compiles_what_the_sampler_and_the_learner_run(tmp_path: Path) -> None:
    """A step of the embedded model by the real compiler, against one that is not compiled."""
    reports = []
    for extra in ([], ["backbone.compile=blocks"]):
        loop = LocalLoop(small_config(tmp_path, "flowbp_sparse", "learners.engine=torch", *extra))
        compiled = [
            block._compiled_call_impl is not None
            for module in (loop.sampler.transformer, loop.learner.engine.bare)
            for block in repeated_blocks(module)
        ]
        assert compiled == [bool(extra)] * len(compiled)
        reports.append((loop.step(0).grad_norm, merge_tensors(list(loop.learner.publish()))))
    (norm, published), (other, compiled_published) = reports
    assert other == pytest.approx(norm, rel=1e-4)
    assert published.keys() == compiled_published.keys()
    for name, tensor in published.items():
        torch.testing.assert_close(compiled_published[name], tensor, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_attention_kernel_is_diffusers_choice(model: Any) -> None:
    """torch's kernel by name is the default, bit for bit; a family without a choice is refused."""
    backbone, table = model
    transformer: Any = backbone.load_transformer(torch.float32)
    if backbone.name == "sd35":
        with pytest.raises(ValueError, match="write attention=null"):
            use_kernels(transformer, None, "native")
        return
    x, node = torch.ones(2, *backbone.latent_shape(*SIZE)), torch.full((2,), 1)
    bound = full_velocity(backbone, transformer, backbone.sigmas(4, *SIZE), table.rows([0, 0]), table.negative(2), 3.0)
    plain = bound(x, node, torch.arange(2))
    for kernel, tolerance in (("native", 0.0), ("_native_math", 1e-5)):
        use_kernels(transformer, None, kernel)  # type: ignore[arg-type]
        torch.testing.assert_close(bound(x, node, torch.arange(2)), plain, rtol=tolerance, atol=tolerance)
    with pytest.raises(ValueError, match=r"backbone\.attention=flash cannot be used here"):
        use_kernels(transformer, None, "flash")


def test_every_kernel_of_the_key_is_one_of_diffusers() -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName

    assert set(get_args(Attention)) <= {backend.value for backend in AttentionBackendName}


def test_zero_3_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"write learners\.zero=2"):
        small_config(
            tmp_path, "flowbp_sparse", "learners.engine=deepspeed", "learners.zero=3", "backbone.compile=blocks"
        )


def test_a_kernel_whose_package_is_missing_is_refused_before_the_run_starts(tmp_path: Path) -> None:
    missing = small_config(tmp_path, "flowbp_sparse", "backbone.attention=flash")
    with pytest.raises(ValueError, match=r"backbone\.attention=flash cannot be used here: .*flash-attn"):
        check(missing)
    check(small_config(tmp_path, "flowbp_sparse", "backbone.attention=native"))


def test_compiled_code_is_kept_where_others_do_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch asks the environment each time. What a user has set stays."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("FLOWBP_RAY_CACHE", str(tmp_path / "own"))
    keep_own_code()
    assert cache_dir() == str(tmp_path / "own" / "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "chosen"))
    keep_own_code()
    assert cache_dir() == str(tmp_path / "chosen")
