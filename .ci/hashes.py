"""Write constraints/cuda-hashes.txt: the packages of constraints/cuda.txt with the sha256 of what pip may take.

    uv pip compile pyproject.toml --extra serve --extra hps --extra quant --extra ocr -c constraints/cuda.txt \\
        --python-version 3.11 --python-platform x86_64-manylinux_2_28 --format pylock.toml --no-header -q -o pylock.toml
    python .ci/hashes.py pylock.toml

Wheels for Linux x86-64 and CPython 3.11, or the sdist where a package has no such wheel. deploy/Dockerfile installs
from it with --require-hashes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).resolve().parents[1]
HEAD = """# The packages of cuda.txt with the sha256 of what pip may take, Linux x86-64, Python 3.11. By .ci/hashes.py.
# pip install --require-hashes -r constraints/cuda-hashes.txt && pip install --no-deps -e .
"""


def hashes(package: dict[str, Any]) -> list[str]:
    """The digests of a package's wheels that fit, or that of its sdist."""
    wheels = [wheel for wheel in package.get("wheels", ()) if fits(wheel["url"].rsplit("/", 1)[-1])]
    files = wheels or [package["sdist"]]
    return sorted({file["hashes"]["sha256"] for file in files})


def fits(name: str) -> bool:
    """Whether CPython 3.11 on x86-64 with glibc can take a wheel, by its name."""
    python, abi, platform = name.removesuffix(".whl").split("-")[-3:]
    pythons = python.split(".")
    native = "cp311" in pythons and abi in ("cp311", "abi3")
    stable = abi == "abi3" and any(re.fullmatch(r"cp3([2-9]|1[01])", one) for one in pythons)
    pure = abi == "none" and ({"py3", "cp311", "py311"} & set(pythons) or any(one.startswith("py3") for one in pythons))
    system = platform == "any" or ("x86_64" in platform and ("manylinux" in platform or platform.startswith("linux")))
    return bool((native or stable or pure) and system)


def main() -> None:
    """Read the lock file, compare its versions with cuda.txt, and write the hashes."""
    packages = tomllib.loads(Path(sys.argv[1]).read_text())["packages"]
    pinned = dict(
        re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints" / "cuda.txt").read_text(), flags=re.MULTILINE)
    )
    locked = {package["name"]: package["version"] for package in packages}
    if locked != pinned:
        sys.exit(f"cuda.txt and the lock file differ: {sorted(set(locked.items()) ^ set(pinned.items()))}")
    lines = []
    for package in packages:
        found = [f"    --hash=sha256:{digest}" for digest in hashes(package)]
        lines.append(" \\\n".join([f"{package['name']}=={package['version']}", *found]) + "\n")
    (ROOT / "constraints" / "cuda-hashes.txt").write_text(HEAD + "".join(lines))


if __name__ == "__main__":
    main()
