"""Whether a merge may write where it is told to: nothing is lost, and there is room."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from jaxmerge.converters.folder import SAFETENSORS_SUFFIX, TORCH_SUFFIXES

# A run keeps this file in its output folder until it is done: {"fingerprint": ...}.
UNFINISHED = "jaxmerge-unfinished.json"


def is_file(output: Path) -> bool:
    """Whether the name is that of one checkpoint file, not of a folder.

    >>> is_file(Path("out/model.safetensors")), is_file(Path("out"))
    (True, False)
    """
    return output.suffix == SAFETENSORS_SUFFIX or output.suffix in TORCH_SUFFIXES


def is_unfinished(output: Path, fingerprint: str) -> bool:
    """Whether the folder holds an unfinished run of the plan with this fingerprint."""
    return _left_by(output) == fingerprint


def mark_unfinished(output: Path, fingerprint: str) -> None:
    """Says in a folder that the plan with this fingerprint is being written there."""
    (output / UNFINISHED).write_text(json.dumps({"fingerprint": fingerprint}), encoding="utf-8")


def unmark(output: Path) -> None:
    """Says that the output is whole."""
    (output / UNFINISHED).unlink()


def output_problems(
    output: Path,
    *,
    sources: Sequence[Path],
    nbytes: int = 0,
    fingerprint: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Returns what stands against writing a merge's output.

    Args:
        output: a folder or a checkpoint file, which need not exist.
        sources: what the merge reads, which must survive.
        nbytes: how much will be written.
        fingerprint: the plan's; None where sources are broken and there is no plan, so that an
            unfinished run cannot be told from another's.
        overwrite: what is there may be replaced.
    """
    for source in sources:
        if _covers(output, source):
            return [f"{output}: the output would overwrite the source {source}"]
    if fingerprint is not None and is_unfinished(output, fingerprint) and not overwrite:
        nbytes -= sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    occupied = _occupied(output, fingerprint, overwrite)
    return [problem for problem in (occupied, _no_room(output, nbytes)) if problem]


def _occupied(output: Path, fingerprint: str | None, overwrite: bool) -> str | None:
    if not os.path.lexists(output):
        return None
    if output.is_dir() and is_file(output):
        return f"{output}: a folder stands where the output file is to be written"
    if not output.is_dir() and not is_file(output):
        return f"{output}: a file stands where the output folder is to be made"
    if overwrite:
        return None
    if not output.is_dir():
        return f"{output}: the output file exists; name another one, or give --overwrite"
    names = sorted(os.listdir(output))
    left_by = _left_by(output)
    if not names or (left_by is not None and fingerprint in (None, left_by)):
        return None
    what = "is not empty" if left_by is None else "holds an unfinished run of another plan"
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"{output}: the output folder {what} ({some}); name another one, or give --overwrite to "
        "replace what is there"
    )


def _left_by(folder: Path) -> str | None:
    """Returns the fingerprint of the run left unfinished there: "" if it cannot be read."""
    try:
        marker = json.loads((folder / UNFINISHED).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        return ""
    return str(marker.get("fingerprint", "")) if isinstance(marker, dict) else ""


def _no_room(output: Path, nbytes: int) -> str | None:
    folder = output.absolute()
    if is_file(output) or not folder.is_dir():
        folder = folder.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        return f"{output}: {folder} is a file, not a folder"
    if not os.access(folder, os.W_OK):
        return f"{output}: no permission to write in {folder}"
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        return (
            f"{output}: no space: the output takes {bytes_text(nbytes)}, and {folder} has "
            f"{bytes_text(free)} free"
        )
    return None


def bytes_text(nbytes: int) -> str:
    """Returns a size as people read it.

    >>> bytes_text(999), bytes_text(2_500_000)
    ('999 B', '2.5 MB')
    """
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _covers(output: Path, source: Path) -> bool:
    output, source = output.resolve(), source.resolve()
    return output == source or output in source.parents
