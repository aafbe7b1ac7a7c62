"""A run's folder, and whether a run may go on with a configuration.

The folder holds config.yaml, prompts.sha256, environment.jsonl, metrics.jsonl, log.txt, status.json, checkpoints/,
images/, and at the end curves.png and summary.json.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from flowbp_ray.config.learners import MOVES
from flowbp_ray.config.loading import dump, load
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.run import environment
from flowbp_ray.run.checkpoint import Checkpoints
from flowbp_ray.run.engine_state import EngineState
from flowbp_ray.run.lock import RunLock
from flowbp_ray.utils.addresses import expand
from flowbp_ray.utils.diff import differing, shown
from flowbp_ray.utils.errors import ConfigError, RunFailed, Stalled, os_error_line
from flowbp_ray.utils.files import sync, write_atomically
from flowbp_ray.utils.secrets import HidingFormatter, hidden
from flowbp_ray.utils.tensor_file import FULL

# What may differ between a run and its continuation: where and with how many processes it runs, not what it computes
# (learners that compute the same sums elsewhere round differently; `driver` says so).
# Whether a role computes on a CPU or on a GPU may not differ. (With another number of threads the bits are the same
# only where torch's kernels give the same bits.)
FREE = {"output", "resume", "cluster", "samplers", "tracking", "checkpoint", "encoder", "nonfinite", "guard"}
WHERE = {"threads", "cpus", "gpus", "resources"}
FREE_IN = {
    "rewards": {"count", "min", "max", "offload", "url", "token_file"} | WHERE,
    "learners": {"interconnect", *MOVES} | WHERE,
}

FORMER = "config.adapters.yaml"
"""Of a run that trained adapters before it trained all weights: its configuration then."""
UNWRITABLE = (*FULL, errno.EROFS, errno.EIO, errno.ESTALE)
FREE_IN_JUDGES = {"url", "server", "concurrency", "timeout", "tries", "backoff", "api_key_env"} | WHERE


class Run:
    """The folder of a run: its paths, and the files that it reads and writes."""

    def __init__(self, folder: Path) -> None:
        """The folder need not exist; `create`, `resume` and `open` check or make it."""
        self.folder = folder
        self.images = folder / "images"
        self.checkpoints = Checkpoints(folder / "checkpoints")
        self.lock: RunLock | None = None
        self.made = False
        """Whether this object made the folder, and its run has not begun."""
        self.resumed = False
        """Whether it began before; what its driver left behind is looked at once the lock is held."""
        self.damaged: list[str] = []  # a line on each checkpoint that was set aside then

    @classmethod
    def create(cls, config: RunConfig) -> Run:
        """Make a new folder. Where the name is taken a number is added to it, so that nothing is overwritten."""
        folder, number = config.run_dir, 2
        while folder.exists() or not (run := cls(folder))._make():
            folder, number = config.run_dir.with_name(f"{config.name}-{number}"), number + 1
        return run._begin(config)

    def _make(self) -> bool:
        """Make the folder; return whether it was not there."""
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir()
        except OSError as error:
            if self.folder.is_dir():
                return False
            raise ConfigError(f"output: {os_error_line(error)}") from error
        self.made = True
        return True

    def _begin(self, config: RunConfig) -> Run:
        """Fill the folder, config.yaml last: a folder without it is no run."""
        self.images.mkdir(parents=True, exist_ok=True)
        self.checkpoints.folder.mkdir(exist_ok=True)
        self.take(config)
        environment.record(self.folder)
        return self

    def take(self, config: RunConfig) -> None:
        """Write config.yaml, in the place of an earlier one."""
        text = dump(config.model_copy(update={"name": self.folder.name}))
        write_atomically(self.folder / "config.yaml", lambda path: path.write_text(text), fsync=True)
        self.__dict__.pop("config", None)  # the one that was read

    def bind_prompts(self, texts: Sequence[str], weights: Sequence[float] = ()) -> None:
        """Store the digest of the run's prompts. Raises ConfigError where it began with other prompts."""
        self.check_prompts(texts, weights)
        (self.folder / "prompts.sha256").write_text(prompts_digest(texts, weights) + "\n")

    def check_prompts(self, texts: Sequence[str], weights: Sequence[float] = ()) -> None:
        """Raises ConfigError where the run began with other prompts than `texts`, or other weights of them."""
        file = self.folder / "prompts.sha256"
        if file.is_file() and file.read_text().strip() != prompts_digest(texts, weights):
            raise ConfigError(f"the prompts of {self.folder} have changed since it began; write another name=")

    @classmethod
    def resume(cls, config: RunConfig) -> Run:
        """Open the run in the folder output/name, or begin one there. `locked` changes what is in it, this does not.

        Raises ConfigError where the folder holds a run of another configuration.
        """
        if not (config.run_dir / "config.yaml").is_file():
            run = cls(config.run_dir)
            run._make()
            return run._begin(config)
        run = cls(config.run_dir)
        before, now = comparable(run.config), comparable(config)
        if before["learners"]["lora"] and now["learners"]["lora"] is None:  # see `artifacts.widen`
            before["learners"] |= {key: now["learners"][key] for key in ("lora", "optimizer")}
        if before["learners"]["lora"] is None and now["learners"]["lora"]:
            raise ConfigError(narrowing(run.folder))
        if config.learners.optimizer.moments == "fp32":  # moments in int8 are only there for one rank
            before["learners"]["optimizer"]["moments"] = "fp32"
        if different := differences(before, now):
            lines = "".join(f"\n  {line}" for line in different)
            raise ConfigError(
                f"{run.folder} is a run of another configuration; write the old values, another name=, or "
                f"resume=never:{lines}"
            )
        run.resumed = True
        return run

    def _take_up(self) -> None:
        """Set damaged checkpoints of a run that goes on aside (`damaged`), and record where it goes on.

        Raises ConfigError where the newest checkpoint is one of another version.
        """
        self.images.mkdir(exist_ok=True)
        self.checkpoints.folder.mkdir(exist_ok=True)
        self.damaged = self.checkpoints.set_damaged_aside()
        environment.record(self.folder)
        for line in self.damaged:
            self.logger().warning("%s", line)

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Open an existing run. Raises ConfigError where there is none in `folder`."""
        path = Path(expand(str(folder)))
        if not (path / "config.yaml").is_file():
            raise ConfigError(f"no run in {folder}: config.yaml is missing; write the folder that train printed")
        return cls(path)

    @cached_property
    def config(self) -> RunConfig:
        """The configuration in config.yaml, read and validated once. Raises ConfigError where it is not valid."""
        return load(self.folder / "config.yaml")

    def logger(self) -> logging.Logger:
        """The run's logger, which writes to log.txt."""
        logger = logging.getLogger(f"flowbp_ray.{self.folder}")
        logger.setLevel(logging.INFO)
        logger.propagate = False
        if not logger.handlers:
            handler = _Log(self.folder / "log.txt")
            handler.setFormatter(HidingFormatter("%(asctime)s %(levelname)s %(message)s"))
            logger.addHandler(handler)
        return logger

    @contextlib.contextmanager
    def locked(self, say: Callable[[str], object]) -> Iterator[None]:
        """The frame of a driver: hold the folder's lock, record why the run fails, and remove one that never began.

        A run that goes on is taken up first: checkpoints that are damaged are set aside. Raises ConfigError where
        another driver holds the lock, RunFailed where the disk does not take a file of the run. say: see `RunLock`.
        """
        with RunLock(self.folder, say) as self.lock:
            try:
                if self.resumed:
                    self._take_up()
                yield
            except (RunFailed, ValueError) as error:
                self._record_failure(error)
                raise
            except OSError as error:
                if error.errno not in UNWRITABLE:
                    raise
                file = error.filename or f"a file in {self.folder}"
                failed = RunFailed(
                    f"{file} cannot be written ({error.strerror}); give it room or make it writable, then "
                    f"name={self.folder.name} resume=auto goes on from the last checkpoint"
                )
                self._record_failure(failed)
                raise failed from error
            finally:
                self._discard()

    def end(self, error: RunFailed) -> None:
        """Do what leaving `locked` with this error does, from another thread of a process that is about to end."""
        self._record_failure(error)
        if self.lock is not None:
            self.lock.release()

    def steps_like_now(self) -> list[int]:
        """Steps of the checkpoints that its learners can load: after `artifacts.widen` not those of adapters."""
        steps, lora = self.checkpoints.steps(), self.config.learners.lora is not None
        if lora or not (self.folder / FORMER).is_file():
            return steps
        return [step for step in steps if not EngineState(self.checkpoints.path(step)).adapters]

    def sync_log(self) -> None:
        """Put the lines of metrics.jsonl onto the disk."""
        if (file := self.folder / "metrics.jsonl").is_file():
            sync(file)

    def check_lock(self) -> None:
        """Raises RunFailed where this process held the folder's lock and another driver has taken it over."""
        if self.lock is not None:
            self.lock.check()

    def keep(self) -> None:
        """The run begins: from now on its folder stays, however it ends."""
        self.made = False

    def _discard(self) -> None:
        """Remove the folder of a run that never began, if this object made it, so that its name is free again."""
        if self.made:
            logger = self.logger()
            for handler in list(logger.handlers):
                handler.close()
                logger.removeHandler(handler)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _record_failure(self, error: Exception) -> None:
        """Write to log.txt why the run ended, and to stalled.json the state of one that made no progress."""
        self.logger().error("%s", error, exc_info=not isinstance(error, RunFailed))
        if isinstance(error, Stalled):
            with contextlib.suppress(OSError):  # the error itself matters more
                (self.folder / "stalled.json").write_text(hidden(json.dumps(error.state, indent=1)) + "\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json."""
        text = json.dumps(summary, indent=2) + "\n"
        write_atomically(self.folder / "summary.json", lambda path: path.write_text(text))

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl but those that a kill tore."""
        path, lines = self.folder / "metrics.jsonl", []
        for line in path.read_text().splitlines() if path.is_file() else []:
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
        return lines


def narrowing(folder: Path) -> str:
    """Why a run of all weights does not go on with adapters, and what to do."""
    return (
        f"{folder} trains all weights, and adapters cannot express what it has learned; for adapters over its result "
        f"`flowbp-ray export {folder} --to DIR`, put DIR/transformer in the place of the one in a copy of the folder "
        "backbone.path, and start from that copy under another name="
    )


class _Log(logging.FileHandler):
    """log.txt: a disk that does not take a line costs the line, and neither the run nor a traceback on stderr."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Lose what could not be written."""


def prompts_digest(texts: Sequence[str], weights: Sequence[float] = ()) -> str:
    """sha256 of a run's prompts, the training prompts first, then the held-out ones: what prompts.sha256 holds.

    weights: of the training prompts, where some are drawn more often; they follow, a line each.
    """
    return hashlib.sha256("\n".join([*texts, *map(repr, weights)]).encode()).hexdigest()


def comparable(config: RunConfig) -> dict[str, Any]:
    """The part of a configuration that must be the same in a run and its continuation, as plain data."""
    plain = config.model_dump(mode="json", exclude=FREE)
    for pool, free in FREE_IN.items():
        plain[pool] = {key: value for key, value in plain[pool].items() if key not in free}
    plain["rewards"]["decoder"].pop("checkpointing")  # which changes no bit
    plain["evaluation"].pop("base_cache")  # nor does this
    plain["judges"] = [judge.model_dump(mode="json", exclude=FREE_IN_JUDGES) for judge in config.judges]
    return plain | {f"{p}.gpus": "above 0" if getattr(config, p).gpus else 0 for p in ("encoder", "samplers", *FREE_IN)}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two configurations of `comparable`, as lines `dotted.key was a, is b`."""
    return [f"{key} was {shown(a)}, is {shown(b)}" for key, a, b in differing(old, new)]
