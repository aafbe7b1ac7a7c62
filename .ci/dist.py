"""Build the sdist and the wheel twice, in two folders, and leave them in dist/ if they are the same bytes.

`make dist` runs it with pinned tools. Built is what git tracks, as it lies in the working tree; times are that of the
last commit, or SOURCE_DATE_EPOCH. The wheel is built from the sdist. twine checks both, and what the wheel holds is
compared with the tracked files of the packages.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("flowbp_ray", "actors", "configs", "benchmarks")


def tracked() -> list[str]:
    """The files that git tracks, but for those that were removed."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def copied(names: list[str], folder: Path) -> Path:
    """The files in a new folder, with modes that no umask decides."""
    for name in names:
        to = folder / name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, to)
        to.chmod(0o755 if os.access(ROOT / name, os.X_OK) else 0o644)
    return folder


def build(what: str, source: Path, out: Path) -> Path:
    """Build the sdist or the wheel of a folder with the tools that are installed."""
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "build", f"--{what}", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"dist: building the {what} failed\n{done.stdout}{done.stderr}")
    (built,) = out.iterdir()
    return built


def repacked(sdist: Path, epoch: int) -> None:
    """Write an sdist again: sorted, of nobody, at one time. setuptools leaves the clock in it."""
    members = []
    with tarfile.open(sdist) as old:
        for member in sorted(old.getmembers(), key=lambda one: one.name):
            data = old.extractfile(member)
            members.append((member, data.read() if data else b""))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new:
        for member, data in members:
            plain = tarfile.TarInfo(member.name)
            plain.type, plain.size, plain.mtime = member.type, len(data), epoch
            plain.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            new.addfile(plain, io.BytesIO(data))
    with sdist.open("wb") as file, gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=epoch) as zipped:
        zipped.write(packed.getvalue())


def once(names: list[str], folder: Path, epoch: int) -> tuple[Path, Path]:
    """An sdist of the tracked files, and the wheel of that sdist."""
    source = copied(names, folder / "source")
    sdist = build("sdist", source, folder / "sdist")
    repacked(sdist, epoch)
    with tarfile.open(sdist) as file:
        file.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return sdist, build("wheel", unpacked, folder / "wheel")


def check_contents(wheel: Path, names: list[str]) -> None:
    """The wheel has every tracked file of the packages, and nothing else but its metadata."""
    expected = {name for name in names if name.split("/")[0] in PACKAGES}
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    if expected != found:
        sys.exit(f"dist: the wheel lacks {sorted(expected - found)}, and has too much: {sorted(found - expected)}")


def main() -> None:
    """Build, compare, check, and leave the files with their digests in dist/."""
    os.umask(0o022)  # the wheel's own metadata has the modes that they are written with
    stamp = ["git", "log", "-1", "--format=%ct"]
    epoch = os.environ.get("SOURCE_DATE_EPOCH") or subprocess.check_output(stamp, cwd=ROOT, text=True).strip()
    os.environ["SOURCE_DATE_EPOCH"] = epoch
    names = tracked()
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        built = once(names, Path(first), int(epoch))
        for one, other in zip(built, once(names, Path(second), int(epoch)), strict=True):
            if one.read_bytes() != other.read_bytes():
                sys.exit(f"dist: two builds of {one.name} differ")
        check_contents(built[1], names)
        subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, built)], check=True)
        shutil.rmtree(ROOT / "dist", ignore_errors=True)
        (ROOT / "dist").mkdir()
        sums = []
        for file in built:
            shutil.copyfile(file, ROOT / "dist" / file.name)
            sums.append(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n")
    (ROOT / "dist" / "SHA256SUMS").write_text("".join(sums))
    print("".join(sums), end="")


if __name__ == "__main__":
    main()
