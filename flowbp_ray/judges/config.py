"""The `judges:` section: which model, where it runs, what it is asked, and what its answers are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from flowbp_ray.judges.templates import AnyTemplate
from flowbp_ray.utils.addresses import parse_url
from flowbp_ray.utils.settings import ProcessConfig, Strict

OURS = {"--model", "--served-model-name", "--host", "--port"}  # vLLM's arguments that every start sets


class GateConfig(Strict):
    """weight = clip((score − low) / (high − low), 0, 1). score: which of the template's; None: its only one.

    low, high: None means the template's range.
    """

    score: str | None = None
    low: float | None = None
    high: float | None = None


class ServerConfig(Strict):
    """How vLLM is started where `model` is given. python: the interpreter of vLLM's environment; None: this one.

    args: more of vLLM's arguments. env: more environment variables. start_timeout: seconds until /health must answer.
    starts: how often in a row it may fail to come up. port: None picks a free one at every start.
    """

    python: str | None = None
    args: list[str] = Field([])
    env: dict[str, str] = Field({})
    port: int | None = Field(None, ge=1, le=65535)
    start_timeout: float = Field(900.0, gt=0)
    starts: int = Field(3, ge=1)

    @field_validator("args")
    @classmethod
    def _not_ours(cls, value: list[str]) -> list[str]:
        """vLLM takes the last of several, so these would lead it away from where it is looked for."""
        for argument in value:
            if (name := argument.partition("=")[0].replace("_", "-")) in OURS:
                instead = "server.port" if name == "--port" else "nothing there"
                raise ValueError(f"server.args says {name}, which is set for every start; write {instead} instead")
        return value


class JudgeConfig(ProcessConfig):
    """A judge; its metrics are called `name`, or `name.score` where the template gives several.

    url: the root of a running OpenAI-compatible server (without /v1); or model: a folder, which is served here.
    role: a monitor judges the pictures of evaluations; a gate weighs every training sample's loss, and stops the run
    where it cannot.
    every: in steps: which evaluations a monitor judges, besides the first and the last. limit: the first so many
    held-out prompts. served_as: the model's name at the server; None: the first that it lists. tries and
    timeout (seconds) are of one question; backoff: seconds after the first failure, twice as many after each further
    one. request: more fields of the request, such as chat_template_kwargs. api_key_env: name of the environment
    variable with the key.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    url: str | None = None
    model: str | None = None
    template: AnyTemplate
    role: Literal["monitor", "gate"] = "monitor"
    every: int = Field(1, ge=1)
    limit: int | None = Field(None, ge=1)
    served_as: str | None = None
    concurrency: int = Field(8, ge=1)
    timeout: float = Field(120.0, gt=0)
    tries: int = Field(4, ge=1)
    backoff: float = Field(1.0, ge=0)
    request: dict[str, Any] = Field({})
    api_key_env: str | None = None
    server: ServerConfig = ServerConfig()
    gate: GateConfig = GateConfig()

    @field_validator("model")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        """Relative to where the command runs: actors run elsewhere."""
        return value and str(Path(value).expanduser().absolute())

    @field_validator("url")
    @classmethod
    def _root(cls, value: str | None) -> str | None:
        return value and str(parse_url(value)).removesuffix("/v1").rstrip("/")

    @property
    def metrics(self) -> dict[str, str]:
        """Score of the template -> name of the metric."""
        scores = self.template.scores
        return {score: self.name if len(scores) == 1 else f"{self.name}.{score}" for score in scores}

    @property
    def gated(self) -> tuple[str, float, float]:
        """The score that weighs, and where its weight is 0 and 1."""
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
        score, low, high = self.gated
        if not low < high:
            raise ValueError(f"judge {self.name!r}: gate.low={low:g} must be below gate.high={high:g} of {score}")
        return self


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
