"""The configurations that faults are injected into: the embedded model, small, on two cores."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.planner import STEPS
from tests.paths import ROOT

STALL = 100  # seconds of stall_timeout where something is to stand still: more than it takes to build the actors
LONG = 240
SMALL = [
    f"steps={STEPS}",
    "backbone.num_steps=6",
    "data.prompts=shapes:train",
    "data.prompts_per_step=4",
    "data.rollout_batch=2",
    "rewards.count=1",
    "rewards.monitors=[]",
    "learners.micro_batch=2",
    "evaluation.prompts=null",
    "checkpoint.every=2",
    "checkpoint.keep=2",
    "cluster.tries=12",
]
TORCH = ["samplers.count=2", "learners.engine=torch", "learners.count=1"]
ZERO = ["learners.engine=deepspeed", "learners.count=2", "learners.zero=2"]
EVALUATED = ["evaluation.prompts=shapes:dev", "evaluation.limit=4", "evaluation.every=4", "evaluation.pictures=4"]
CONFIGURATIONS = {
    "one": [*TORCH, "staleness=0"],
    "two": [*ZERO, "samplers.count=1", "staleness=1", "learners.ema={decay: 0.9}", *EVALUATED],
    "judged": [*TORCH, "staleness=0"],
    "hosts": [*ZERO, "samplers.count=3", "staleness=0"],
}
MEANING = {
    "one": "one learner in plain torch, two samplers, staleness 0",
    "two": "two ZeRO-2 ranks, one sampler, staleness 1, an average of the weights, evaluations",
    "judged": "as `one`, with a judge as gate that starts a stand-in for a vLLM server",
    "hosts": "two ZeRO-2 ranks and three samplers on three hosts in network namespaces",
}


def overrides(config: str, work: Path, stalls: bool = False) -> list[str]:
    """The arguments of `train` for a configuration. work: where a judge's model may lie."""
    own = [*SMALL, *CONFIGURATIONS[config], f"cluster.stall_timeout={STALL if stalls else LONG}"]
    return [*own, judge(work)] if config == "judged" else own


def judge(work: Path) -> str:
    """A gate with a server of its own, whose every answer halves the loss: a lost answer would show in the weights."""
    model = work / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    server = f"{{env: {{PYTHONPATH: '{ROOT / 'tests' / 'judges' / 'stand_in'}'}}}}"
    gate = "gate: {low: 3, high: 5}"
    fields = f"name: eye, model: '{model}', role: gate, {gate}, tries: 8, server: {server}"
    return f"judges=[{{{fields}, template: {{kind: unified_reward_1_5}}}}]"
