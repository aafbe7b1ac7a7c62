"""The page of docs/ that explains an error: the one table of them. `flowbp-ray` names it at the end of the line."""

from __future__ import annotations

import re

from flowbp_ray.utils.errors import NoSpace, Stalled, os_error_line

BY_CLASS: tuple[tuple[type[BaseException], str], ...] = (
    (Stalled, "observing.md#from-its-folder"),
    (NoSpace, "architecture.md#a-checkpoint"),
)

BY_WORDS: tuple[tuple[str, str], ...] = (
    (r"data\.heldout|data:heldout", "prompts.md#holding-a-share-out"),
    (r"data\.weights", "prompts.md#how-often-each-is-drawn"),
    (
        r"(data|evaluation)\.(columns|split|where)|no text under|no column is called",
        "prompts.md#columns-splits-and-selection",
    ),
    (r"prompts file|(data|evaluation)\.prompts: ", "prompts.md"),
    (r"backbone\.quantization|flowbp-ray\[quant\]", "one-card.md#a-quantised-base"),
    (r"cluster\.share_base", "one-card.md#a-shared-base"),
    (r"cluster\.transport", "cluster.md#how-weights-travel"),
    (r"cluster\.scaling|(samplers|rewards)\.(min|max)", "cluster.md#more-or-fewer-while-it-runs"),
    (r"cluster\.colocate|learners\.gpus=|learners\.lora", "one-card.md"),
    (r"RAY_AUTH|RAY_ADDRESS|cluster\.address|Ray cluster", "cluster.md#a-cluster"),
    (r"rewards\.url|reward server at|FLOWBP_RAY_REWARD_TOKEN|rewards\.token_file", "remote-rewards.md"),
    (r"\bguard(\.|\b)", "rewards.md#when-a-reward-is-hacked"),
    (r"\bjudges?\b", "judges.md"),
    (r"\b(soft_)?geneval\b", "rewards.md#geneval"),
    (r"flowbp-ray\[ocr\]|\bocr\b", "rewards.md#text-in-pictures"),
    (r"\bnft\.|gradient: none|gradient=none", "any-reward.md"),
    (r"base_penalty", "staying-near-the-base.md"),
    (r"rewards\.(terms|monitors)|unknown reward|flowbp-ray\[hps\]|\bthe reward '", "rewards.md#available-rewards"),
    (r"drift\.max", "architecture.md#what-is-watched"),
    (r"unknown method|method\.name", "choosing-a-method.md"),
    (r"\bmethod\.|\baxis\b", "adding-a-method.md"),
    (
        r"run of another configuration|have changed since|resume=|from before this format",
        "architecture.md#stop-kill-go-on",
    ),
    (r"no run in ", "architecture.md#a-runs-folder"),
    (r"--gpus|--host-memory", "will-it-fit.md"),
    (r"--against|--weights|--step is of|--prompts FILE|another evaluation", "evaluation.md"),
    (r"a profile|--emulate", "benchmarking.md#emulated-devices"),
    (r"(diffusers folder|model_index\.json|backbone\.path)", "gpus.md#start"),
    (r"\bencoder\.(cache|longest|gpus|threads|ahead)", "architecture.md#text"),
)
"""What is in the message -> page and anchor; the first that matches counts, so what is narrow stands first."""

SECTIONS = (
    "backbone", "data", "encoder", "samplers", "rewards", "judges", "learners", "evaluation", "checkpoint", "drift",
    "tracking", "cluster", "nft", "guard", "method",
)  # fmt: skip
"""Sections of a configuration: a key that no page explains is explained at docs/configuration.md."""


def page_of(error: BaseException) -> str:
    """The page that explains an error, such as docs/prompts.md#holding-a-share-out; "" where there is none."""
    for kind, page in BY_CLASS:
        if isinstance(error, kind):
            return f"docs/{page}"
    words = re.sub(r"\S*/\S*", "", str(error))  # without paths, in which any word may stand
    for pattern, page in BY_WORDS:
        if re.search(pattern, words):
            return f"docs/{page}"
    found = re.search(rf"\b({'|'.join(SECTIONS)})(?:\[\d+\])?\.[a-z_]+", words)
    return f"docs/configuration.md#{found[1]}" if found else ""


def with_page(error: BaseException) -> str:
    """The message of an error, with the page that explains it at its end, unless it names one itself."""
    message, page = os_error_line(error) if isinstance(error, OSError) else str(error), page_of(error)
    return message if not page or "docs/" in message else f"{message} (see {page})"
