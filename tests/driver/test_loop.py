"""The loop on real Ray against the same maths in one process, bit for bit, and what it promises about bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.transport import load
from flowbp_ray import driver, prompts
from flowbp_ray.backbones.embeddings import PackedEmbeddings
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.driver import Loop
from flowbp_ray.local import LocalLoop, encode
from flowbp_ray.run.folder import Run
from flowbp_ray.weights.packing import merge_tensors
from tests.driver.chaos import before_step
from tests.small import small_config

pytestmark = pytest.mark.ray


def local_weights(config: RunConfig) -> tuple[str, dict[str, torch.Tensor]]:
    """Digest and weights after the steps of `config` in one process."""
    loop = LocalLoop(config)
    for step in range(config.steps):
        loop.step(step)
    return loop.learner.digest(), {k: v.clone() for k, v in loop.learner.engine.weights().items()}


def trained(config: RunConfig) -> tuple[Run, dict[str, Any], dict[str, torch.Tensor]]:
    run, summary = driver.train(config)
    return run, summary, run.checkpoints.weights()[1]


@pytest.mark.parametrize("method", ["flowbp_sparse", pytest.param("flowbp_bridge", marks=pytest.mark.long)])
def test_bit_for_bit_with_one_process(local_ray: Any, tmp_path: Path, method: str) -> None:
    """S = 0, one learner, plain torch; more pools and an embedding cache change nothing."""
    pools = ["samplers.count=2", "rewards.count=2"]
    config = small_config(tmp_path, method, *pools)
    _, summary, _ = trained(small_config(tmp_path, method, *pools, "name=ray", "encoder.cache=null"))
    digest, _ = local_weights(config)
    assert summary["weights_sha256"] == digest
    untrained = LocalLoop(config).learner.digest()
    assert digest != untrained


@pytest.mark.long
@pytest.mark.parametrize("servers", [1, 2, 4])
def test_balanced_rewards_over_several_servers(local_ray: Any, tmp_path: Path, servers: int) -> None:
    both = [
        "data.rollout_batch=1",
        "rewards.balance=grad_norm",
        "rewards.terms=[{name: shapes_clip}, {name: shapes_clip_heldout, weight: 0.5}]",
    ]
    config = small_config(tmp_path, "flowbp_sparse", *both, f"rewards.count={servers}")
    run, summary, _ = trained(config)
    assert summary["weights_sha256"] == local_weights(config)[0]
    line = [line for line in run.metrics() if line["kind"] == "train"][-1]
    pulls = {
        n: line[f"reward_share/{n}"] * line[f"reward_grad_norm/{n}"] for n in ("shapes_clip", "shapes_clip_heldout")
    }
    assert pulls["shapes_clip"] == pytest.approx(2 * pulls["shapes_clip_heldout"], rel=1e-6)
    assert line["cotangent_bytes_per_image"] == 2 * line["target_bytes_per_image"]


@pytest.mark.long
@pytest.mark.parametrize("method", ["draft_lv", "leapalign", "refl", "drtune", "flowbp_lagrange"])
def test_every_other_method_runs_by_name(local_ray: Any, tmp_path: Path, method: str) -> None:
    config = small_config(tmp_path, method, "steps=1")
    _, summary, _ = trained(config)
    assert summary["weights_sha256"] == local_weights(config)[0]


def test_what_travels_and_what_a_learner_holds(local_ray: Any, tmp_path: Path) -> None:
    """K states, one target and one cotangent per image: elements x itemsize, measured on what travelled.

    Embeddings of what is drawn come to a sampler once, and then with no item; no other prompt is encoded. A learner's
    process has neither decoder nor reward.
    """
    config = small_config(tmp_path, "flowbp_sparse", "method.k=3", "steps=2", "data.images_per_prompt=2")
    modules: set[str] = set()
    published: dict[str, torch.Tensor] = {}

    def note(loop: Loop) -> None:
        modules.update(local_ray.get(loop.fleet.learners.ranks[0].modules.remote()))
        published.update(merge_tensors(load(loop.published[1].weights)))

    with before_step(1, note):
        run, _, weights = trained(config)
    first, line = run.metrics()
    latent = 8 * 8 * 8 * 4
    assert line["state_bytes_per_image"] == 3 * latent == line["state_bytes_per_image_formula"]
    assert line["target_bytes_per_image"] == latent
    assert line["cotangent_bytes_per_image"] == latent
    assert line["travel_bytes_per_image"] == pytest.approx(5 * latent + line["item_bytes_per_image"])
    texts = [record.text for record in prompts.load(config.data.prompts)]
    drawn = prompts.drawn(config, len(texts), 0)
    assert len(drawn) == 8 < len(texts)
    table = PackedEmbeddings.of(encode(config, texts, drawn))
    assert first["embedding_bytes"] + line["embedding_bytes"] == table.nbytes  # each part once
    assert line["weight_bytes"] == sum(tensor.nbytes for tensor in weights.values())
    assert f"embeddings: {len(drawn) + 1} distinct prompts" in (run.folder / "log.txt").read_text()
    assert published.keys() == weights.keys()
    assert "flowbp_ray.learning.learner" in modules
    assert not [m for m in modules if m.startswith("flowbp_ray.rewards")]
    assert not [m for m in modules if m.startswith("diffusers.models.autoencoders.autoencoder_kl")]
