"""`flowbp-ray serve-reward`: check everything that a user may have to change, load the rewards, then listen."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.rewards.remote import token
from flowbp_ray.rewards.remote.limits import ServerLimits
from flowbp_ray.rewards.remote.service import Service
from flowbp_ray.rewards.scorer import check_rewards
from flowbp_ray.utils.random import use_deterministic_kernels


def serve(
    config: RunConfig,
    host: str,
    port: int,
    token_file: Path | None,
    max_rows: int | None,
    waiting: int,
    say: Callable[[str], object],
) -> None:
    """Serve the rewards of `config` until SIGTERM or Ctrl-C. say: prints a line.

    Raises ValueError for what the user must change, and OSError where the address is taken.
    """
    try:
        from flowbp_ray.rewards.remote.server import serve as answer
    except ModuleNotFoundError as error:
        raise ValueError(f"serve-reward needs {error.name}; write pip install 'flowbp-ray[serve]'") from error
    config = config.model_copy(update={"rewards": config.rewards.model_copy(update={"url": None})})  # that is this one
    of_config = named(config)
    secret = token.read(
        token_file or of_config, "rewards.token_file" if of_config and not token_file else "--token-file"
    )
    check_rewards(config.rewards)
    torch.set_num_threads(config.rewards.threads)
    if config.cluster.deterministic:
        use_deterministic_kernels()
    with bound(host, port) as listening:
        service = Service(config, ServerLimits.of(config, max_rows, waiting))
        names = ", ".join(reward.name for reward in config.rewards.all)
        where = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        answer(service, secret, listening, lambda: say(f"serving {names} at {where}"))


def named(config: RunConfig) -> str | None:
    """The file that the configuration names, unless the environment has the token."""
    return None if os.environ.get(token.VARIABLE) else config.rewards.token_file


def bound(host: str, port: int) -> socket.socket:
    """A socket at the address that does not listen yet, so that nobody is let in before the rewards are loaded."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise ValueError(f"--host {host!r} is no address of this machine ({error.strerror})") from error
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise OSError(f"--host {host} --port {port} cannot be listened at: {error.strerror}") from error
    return listening
