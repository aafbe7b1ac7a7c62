"""Datasets of the Hugging Face Hub as a source of prompts: `hf://datasets/OWNER/NAME[@REVISION][/PATH]`.

Their files of prompts are fetched into the Hub's cache, and are then read as those of a folder are. The variables of
the Hub's client apply: HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from flowbp_ray.prompt_sources import folders

PREFIX = "hf://"
ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/@]+))?(?:/(.+?)/?)?")
SAVED = ("*dataset_dict.json", "*state.json")


def fetched(source: str, kinds: Collection[str], what: str) -> Path:
    """The folder that a dataset of the Hub lies in here, or the file or pattern below it that the source names.

    kinds: the suffixes that can be read; nothing else is fetched. what: names the source, for messages. Raises
    ValueError for another address, and where it cannot be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    found = ADDRESS.fullmatch(source)
    if found is None:
        raise ValueError(f"{what} is no dataset of the Hub; write hf://datasets/OWNER/NAME, with @REVISION and /PATH "
                         "if need be")  # fmt: skip
    repository, revision, below = found.groups()
    most = [kind for kind in kinds if kind not in folders.BESIDE_OTHERS]
    wanted = [below, f"{below}/*"] if below else [*(f"*{kind}" for kind in most), *SAVED]
    try:
        folder = Path(snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=wanted))
        if not below and not any(folders.holds_data(path.relative_to(folder), most) for path in folder.rglob("*")):
            wanted = [f"*{kind}" for kind in folders.BESIDE_OTHERS]
            snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=wanted)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{what} cannot be fetched ({reason}); write a name and revision that are there, set HF_TOKEN "
                         "for one that is private or gated, or name a folder") from error  # fmt: skip
    return folder / (below or "")
