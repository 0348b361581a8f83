"""Folders elsewhere (gs://, s3:// and whatever else etils.epath knows): fetched before, published after a merge."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxmerge.converters.folder import INDEX_SUFFIX, SAFETENSORS_SUFFIX
from jaxmerge.converters.side_files import is_weights
from jaxmerge.recipes.errors import PlanError
from jaxmerge.recipes.output import UNFINISHED, is_journal

_BLOCK = 1 << 24


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path has a scheme, as `gs://bucket/model`.

    >>> is_remote("gs://bucket/model"), is_remote("models/a")
    (True, False)
    """
    return "://" in os.fspath(path)


def fetch(address: str) -> Path:
    """Returns a local copy of a remote file or folder; what has not changed is not fetched again.

    The copies are in `$XDG_CACHE_HOME/jaxmerge` (or `~/.cache/jaxmerge`).

    Args:
        address: with a scheme.

    Raises:
        FileNotFoundError: there is nothing there, or the scheme needs a package.
    """
    there = _remote(address)
    here = _cache("sources", address)
    try:
        if not there.exists():
            raise FileNotFoundError(f"there is nothing at {address}")
        files = dict(_wanted(there)) if there.is_dir() else {there.name: there}
        for name, file in files.items():
            _fetch_file(file, here / "files" / name, here / "stamps" / name)
    except ImportError as error:
        raise FileNotFoundError(f"{address}: {error}") from None
    return here / "files" if there.is_dir() else here / "files" / there.name


def staged(address: str) -> Path:
    """Returns the local place in which an output comes to be before it is published."""
    return _cache("outputs", address) / address.rstrip("/").rpartition("/")[2]


def check_free(address: str, fingerprint: str, *, overwrite: bool) -> None:
    """Checks that an output may be published somewhere.

    Args:
        address: with a scheme.
        fingerprint: of the plan, whose own unfinished output may be there.
        overwrite: whatever is there may be replaced.

    Raises:
        PlanError: something else is there.
    """
    there = _remote(address)
    if overwrite or not there.exists():
        return
    if there.is_dir():
        marker = there / UNFINISHED
        names = [entry.name for entry in there.iterdir()]
        if not names or (marker.exists() and _text(marker) == fingerprint):
            return
    raise PlanError([f"{address}: is there already; name another one, or give --overwrite"])


def publish(output: Path, address: str, fingerprint: str) -> None:
    """Copies a whole output to its address, and then removes the local one.

    A folder there holds a marker until it is whole, and what loaders look for first comes last.

    Args:
        output: as `staged` names it.
        address: with a scheme.
        fingerprint: of the plan, for the marker.
    """
    there = _remote(address)
    if output.is_file():
        there.parent.mkdir(parents=True, exist_ok=True)
        _copy(output, there)
        shutil.rmtree(output.parent)
        return
    there.mkdir(parents=True, exist_ok=True)
    marker = there / UNFINISHED
    with marker.open("w") as file:
        file.write(fingerprint)
    files = [file for file in output.rglob("*") if file.is_file()]
    names = sorted((str(file.relative_to(output)) for file in files), key=_is_looked_for)
    for name, file in list(_files(there)):
        if name not in names and not is_journal(name):
            file.unlink()
    for name in names:
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        _copy(output / name, there / name)
    marker.unlink()
    shutil.rmtree(output.parent)


def _is_looked_for(name: str) -> bool:
    return name == "config.json" or name.endswith(INDEX_SUFFIX)


def _remote(address: str) -> Any:
    from etils import epath

    try:
        return epath.Path(address)
    except KeyError:
        scheme = address.partition("://")[0]
        raise FileNotFoundError(f"{address}: nothing is known of {scheme}://") from None


def _cache(kind: str, address: str) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "jaxmerge" / kind / hashlib.sha256(address.encode()).hexdigest()[:24]


def _wanted(folder: Any) -> Iterator[tuple[str, Any]]:
    """Yields the files of a model's folder, without copies of the weights in other formats."""
    files = list(_files(folder))
    if any(name.endswith(SAFETENSORS_SUFFIX) for name, _ in files):
        files = [
            (name, file)
            for name, file in files
            if not is_weights(name) or SAFETENSORS_SUFFIX in name
        ]
    yield from files


def _files(folder: Any, inside: str = "") -> Iterator[tuple[str, Any]]:
    for entry in folder.iterdir():
        if entry.name in ("", ".", "..") or "/" in entry.name:
            continue
        if entry.is_dir():
            yield from _files(entry, f"{inside}{entry.name}/")
        else:
            yield inside + entry.name, entry


def _fetch_file(there: Any, here: Path, known: Path) -> None:
    """Fetches a file unless it has the size and time of change that are known of the copy."""
    stat = there.stat()
    stamp = json.dumps([stat.length, stat.mtime])
    if here.exists() and known.exists() and known.read_text() == stamp:
        return
    for file in (here, known):
        file.parent.mkdir(parents=True, exist_ok=True)
    known.unlink(missing_ok=True)
    partial = here.with_name(here.name + ".partial")
    with there.open("rb") as source, partial.open("wb") as target:
        shutil.copyfileobj(source, target, _BLOCK)
    partial.replace(here)
    known.write_text(stamp)


def _copy(here: Path, there: Any) -> None:
    with here.open("rb") as source, there.open("wb") as target:
        shutil.copyfileobj(source, target, _BLOCK)


def _text(file: Any) -> str:
    with file.open("r") as opened:
        return str(opened.read())
