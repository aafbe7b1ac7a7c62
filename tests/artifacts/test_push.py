"""`export --push` against a stand-in for the Hub's HTTP API, with huggingface_hub's own client."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCardData

from flowbp_ray.artifacts.push import check_repo
from flowbp_ray.utils.addresses import free_port
from tests.artifacts import hub
from tests.paths import ROOT

TOKEN = "hf_" + "a1B2" * 9
PUSH = """
import sys
from pathlib import Path
from flowbp_ray.artifacts.push import check_repo, push
try:
    check_repo(sys.argv[2])
    print(push(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "private", "mine, step 4"))
except ValueError as error:
    print("refused:", error)
"""


def pushed(folder: Path, repo: str, endpoint: str, visibility: str = "public") -> str:
    """What a process prints that pushes the folder; its environment decides on the server and the token."""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT),
           "HF_HOME": str(folder.parent / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*"}  # fmt: skip
    command = [sys.executable, "-c", PUSH, str(folder), repo, visibility]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "out"
    (made / "images").mkdir(parents=True)
    front = ModelCardData(library_name="diffusers", base_model="org/base").to_yaml()
    (made / "README.md").write_text(f"---\n{front}\n---\n# mine\n")
    (made / "flowbp_ray.yaml").write_text("name: mine\n")
    (made / "mine.safetensors").write_bytes(bytes(range(256)) * 40)
    (made / "images" / "0.png").write_bytes(b"\x89PNG picture")
    return made


def test_a_folder_becomes_a_commit(folder: Path) -> None:
    """Each file with its bytes, small and large; the token goes to the server and nowhere else."""
    with hub.running() as server:
        assert pushed(folder, "me/mine", server.address, "private") == f"{server.address}/me/mine"
        assert [(m["organization"], m["name"]) for m in server.made] == [("me", "mine")]
        assert "private" in (server.made[0].get("visibility"), server.made[0].get("private") and "private")
        files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        assert server.files == {"me/mine": files} and server.commits == ["mine, step 4"]
        assert server.tokens == {f"Bearer {TOKEN}"}
        assert pushed(folder, "mine", server.address) == f"{server.address}/someone/mine"  # the name's owner is asked


def test_what_the_hub_refuses_is_one_line(folder: Path) -> None:
    with hub.running((403, f"the token {TOKEN} may not write")) as server:
        said = pushed(folder, "me/mine", server.address)
    assert said.startswith("refused: me/mine was not pushed: ") and "may not write" in said and "***" in said
    assert said.endswith(f"the export is in {folder}") and len(said.splitlines()) == 1
    said = pushed(folder, "me/mine", f"http://127.0.0.1:{free_port()}")
    assert said.startswith("refused: me/mine was not pushed: ") and len(said.splitlines()) == 1


def test_a_name_or_a_token_that_will_not_do_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"--push a//b: .* write name, or organisation/name"):
        check_repo("a//b")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="--push needs a token that may write: set HF_TOKEN"):
        check_repo("me/mine")
