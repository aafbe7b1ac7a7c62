"""What turns summed gradients into a step: plain torch on one rank, or DeepSpeed ZeRO over several."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flowbp_ray.config import LearnersConfig, OptimizerConfig
from flowbp_ray.weights import trained


class Engine(Protocol):
    """One optimizer over one module. `backward` is called once per forward and `step` once after the last."""

    module: nn.Module
    scale: float
    """What cotangents are multiplied by, so that an engine that averages over ranks gives their sum."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradient of a scalar, unscaled: the gradient at the states is read too. `last` ends a step."""

    def step(self) -> float:
        """Clip, update, clear the gradients; returns the global gradient norm before clipping."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The trained parameters, whole, in the module's dtype. Every rank calls it; rank 0's answer counts."""
        ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class TorchEngine:
    """AdamW on one rank."""

    scale = 1.0

    def __init__(self, module: nn.Module, config: OptimizerConfig) -> None:
        self.module = module
        self.max_grad_norm = config.max_grad_norm
        self.parameters = list(trained(module).values())
        self.optimizer = adamw(self.parameters, config)

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in trained(self.module).items()}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {"weights": self.weights(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, folder / "engine.pt")

    def load(self, folder: Path) -> None:
        from flowbp_ray.weights import install

        state = torch.load(folder / "engine.pt", weights_only=True)
        install(self.module, state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])


class DeepSpeedEngine:
    """ZeRO stage 0–3 over the ranks of an already initialised process group."""

    def __init__(self, module: nn.Module, config: LearnersConfig, dtype: torch.dtype) -> None:
        import deepspeed

        self.module = module
        self.stage = config.zero
        self.scale = float(torch.distributed.get_world_size())
        self.named = trained(module)
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=adamw(list(self.named.values()), config.optimizer),
            config=deepspeed_config(config, dtype),
            dist_init_required=False,
        )
        self.module = self.engine

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def step(self) -> float:
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def weights(self) -> dict[str, Tensor]:
        if self.stage < 3:
            return {name: p.detach() for name, p in self.named.items()}
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.named.values())):
            return {name: p.detach().clone() for name, p in self.named.items()}

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag="engine")

    def load(self, folder: Path) -> None:
        path, _ = self.engine.load_checkpoint(str(folder), tag="engine")
        if path is None:
            raise ValueError(f"no DeepSpeed checkpoint in {folder}")


def adamw(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )


def deepspeed_config(config: LearnersConfig, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's own settings; the batch is ours, so it is told one row per accumulation step."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "zero_optimization": {"stage": config.zero},
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 10**9,
    }


def init_gang(rank: int, ranks: int, address: str, port: int) -> None:
    """Join the learners' process group: gloo on CPU, NCCL where there are GPUs. Before any DeepSpeed engine."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": "0",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    if not on_gpu:
        __compatible_ops__["deepspeed_shm_comm"] = False  # would compile for a minute, for one host's collectives
    deepspeed.init_distributed("nccl" if on_gpu else "gloo")


def make_engine(module: nn.Module, config: LearnersConfig, dtype: torch.dtype) -> Engine:
    """The engine that `learners.engine` names."""
    if config.engine == "torch":
        return TorchEngine(module, config.optimizer)
    return DeepSpeedEngine(module, config, dtype)
