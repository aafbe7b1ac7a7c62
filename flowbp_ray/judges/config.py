"""The `judges:` section: which model, where it runs, what it is asked, and what its answers are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from flowbp_ray.judges.templates import AnyTemplate
from flowbp_ray.utils.addresses import parse_url
from flowbp_ray.utils.settings import ProcessConfig, Strict

SET_BY_US = {"--model", "--served-model-name", "--host", "--port"}  # vLLM's arguments that every start sets


class GateConfig(Strict):
    """How a gate's score becomes a weight: clip((score − low) / (high − low), 0, 1)."""

    score: str | None = None
    """Which of the template's scores weighs. null: its only one."""
    low: float | None = None
    """Score at which, and below which, the weight is 0. null: the worst score of the template."""
    high: float | None = None
    """Score at which, and above which, the weight is 1. null: the best score of the template."""


class ServerConfig(Strict):
    """How vLLM is started where `model` is given."""

    python: str | None = None
    """Interpreter of the environment that has vLLM. null: the one that this command runs in."""
    args: list[str] = Field([])
    """Further arguments of vLLM's server, one entry each."""
    env: dict[str, str] = Field({})
    """Further environment variables of the server."""
    port: int | None = Field(None, ge=1, le=65535)
    """TCP port of the server, on its own node. null: a free one is picked at every start."""
    start_timeout: float = Field(900.0, gt=0)
    """Seconds until the server must answer at /health."""
    starts: int = Field(3, ge=1)
    """How often in a row the server may fail to start before the judge fails."""

    @field_validator("args")
    @classmethod
    def _not_set_by_us(cls, value: list[str]) -> list[str]:
        """Refuse arguments that every start sets: vLLM takes the last of several, and would then not be found."""
        for argument in value:
            if (name := argument.partition("=")[0].replace("_", "-")) in SET_BY_US:
                instead = "server.port" if name == "--port" else "nothing there"
                raise ValueError(f"server.args says {name}, which is set for every start; write {instead} instead")
        return value


class JudgeConfig(ProcessConfig):
    """A vision-language model that looks at pictures: a running server at `url`, or a `model` that the run serves.

    Its metric is called `name`, or `name.score` where the template gives several scores.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    """Name of the judge, and of its metrics."""
    url: str | None = None
    """Root of a running OpenAI-compatible server, without /v1. null: `model` is served by the run."""
    model: str | None = None
    """Folder of a model that the run serves with vLLM. null: the judge is at `url`."""
    template: AnyTemplate
    """What the judge is asked, and how its answer is read."""
    role: Literal["monitor", "gate", "reward"] = "monitor"
    """monitor: it judges the pictures of evaluations, beside training. gate: its score weighs the loss of every
    training sample, and the run stops where it cannot answer. reward: its scores of the training samples are trained
    on, by the terms of rewards.terms with `kind: judge` and the name of its metric; a prompt with an image that it
    cannot score is left out of the step."""
    every: int = Field(1, ge=1)
    """A monitor judges the evaluations of steps that are multiples of this, and always the first and the last."""
    limit: int | None = Field(None, ge=1)
    """A monitor judges the first so many held-out prompts. null: all."""
    served_as: str | None = None
    """Name of the model at the server. null: the first that the server lists."""
    concurrency: int = Field(8, ge=1)
    """Questions that are under way at a time."""
    timeout: float = Field(120.0, gt=0)
    """Seconds until an attempt at a question must be answered."""
    tries: int = Field(4, ge=1)
    """Attempts at one question before a monitor's sample counts as missing, or a gate stops the run."""
    backoff: float = Field(1.0, ge=0)
    """Longest wait in seconds after the first failed attempt; it doubles with each further one, up to 60. Each wait is
    drawn between half of that and all of it."""
    request: dict[str, Any] = Field({})
    """Further fields of each request's body, such as chat_template_kwargs."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the server's API key. null: no key is sent."""
    server: ServerConfig = ServerConfig()
    """How vLLM is started, where `model` is given."""
    gate: GateConfig = GateConfig()
    """How the score becomes a weight, where role is gate."""

    @field_validator("model")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        """Make it absolute, as seen from where the command runs: actors run elsewhere."""
        return value and str(Path(value).expanduser().absolute())

    @field_validator("url")
    @classmethod
    def _root(cls, value: str | None) -> str | None:
        return value and str(parse_url(value)).removesuffix("/v1").rstrip("/")

    @property
    def metrics(self) -> dict[str, str]:
        """Score of the template -> name of its metric."""
        scores = self.template.scores
        return {score: self.name if len(scores) == 1 else f"{self.name}.{score}" for score in scores}

    @property
    def gate_bounds(self) -> tuple[str, float, float]:
        """(score that weighs, its value at weight 0, its value at weight 1)."""
        low, high = self.template.range
        gate = self.gate
        return (
            gate.score or self.template.scores[0],
            low if gate.low is None else gate.low,
            high if gate.high is None else gate.high,
        )

    @model_validator(mode="after")
    def _consistent(self) -> JudgeConfig:
        if (self.url is None) == (self.model is None):
            raise ValueError(f"judge {self.name!r} needs either url (a running server) or model (a folder to serve)")
        if self.role != "gate":
            return self
        scores = self.template.scores
        if self.gate.score not in scores and (self.gate.score is not None or len(scores) > 1):
            raise ValueError(f"judge {self.name!r}: gate.score must be one of {', '.join(scores)}")
        score, low, high = self.gate_bounds
        if not low < high:
            raise ValueError(f"judge {self.name!r}: gate.low={low:g} must be below gate.high={high:g} of {score}")
        return self


def check_judged_terms(judges: list[JudgeConfig], terms: set[str]) -> None:
    """Raises ValueError where a term names no judge's metric, or a judge with role=reward has no term.

    terms: names of the terms that judges score.
    """
    offered = {metric: judge for judge in judges if judge.role == "reward" for metric in judge.metrics.values()}
    for name in sorted(terms - offered.keys()):
        known = ", ".join(offered) or "none: write role: reward in its entry of judges"
        raise ValueError(f"rewards.terms names {name!r} with kind: judge, but the judges' metrics are {known}")
    for judge in {judge.name: judge for judge in offered.values()}.values():
        if not terms & set(judge.metrics.values()):
            raise ValueError(
                f"judge {judge.name!r} has role=reward and no term; write in rewards.terms {{name: "
                f"{next(iter(judge.metrics.values()))}, kind: judge, gradient: none}}"
            )


def check_names_and_ports(judges: list[JudgeConfig], taken: set[str]) -> None:
    """Raises ValueError where two metrics would have one name, or two servers of our own one port."""
    ports: dict[int, str] = {}
    for judge in judges:
        port = judge.server.port
        if judge.model is not None and port is not None and ports.setdefault(port, judge.name) != judge.name:
            raise ValueError(
                f"judges {ports[port]!r} and {judge.name!r} both have server.port={port}; write two ports, or null, "
                "which picks a free one"
            )
        for metric in (judge.name, *judge.metrics.values()):
            if metric in taken:
                raise ValueError(f"judge {judge.name!r} would be reported as {metric!r}, which is taken; rename it")
        taken |= {judge.name, *judge.metrics.values()}
