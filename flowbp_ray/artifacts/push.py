"""An export's folder to a model repository on the Hugging Face Hub, or on the server in $HF_ENDPOINT."""

from __future__ import annotations

from pathlib import Path

from flowbp_ray.utils.errors import ConfigError
from flowbp_ray.utils.secrets import hidden


def check_repo(repo: str) -> None:
    """Raise ConfigError, without asking the Hub, for a name that it does not take, or where there is no token."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push {repo}: {_line(error)}; write name, or organisation/name") from error
    if get_token() is None:
        raise ConfigError("--push needs a token that may write: set HF_TOKEN, or run `hf auth login`")


def push(folder: Path, repo: str, private: bool, message: str) -> str:
    """Commit the files of `folder` to the model repository `repo`, made if it is not there; return its address.

    private: of a repository that is made; else it is as its owner's are by default. Files of the same names are
    replaced, others stay. Raises ConfigError, in a line without the token, where the Hub does not take it.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="flowbp_ray")
    try:
        name = api.create_repo(repo, repo_type="model", private=private or None, exist_ok=True).repo_id
        api.upload_folder(folder_path=folder, repo_id=name, commit_message=message)
    except Exception as error:  # the errors of the client's transport are classes of another library in each version
        raise ConfigError(f"{repo} was not pushed: {_line(error)}; the export is in {folder}") from error
    return f"{api.endpoint}/{name}"


def _line(error: BaseException) -> str:
    """The error on one line, without secrets."""
    return hidden(" ".join(str(error).split()))[:300] or type(error).__name__
