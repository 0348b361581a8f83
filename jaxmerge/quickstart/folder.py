"""The quickstart's output folder: whose it is, and files that appear complete."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = "results.json"

_MADE_BY = "jaxmerge quickstart"


class QuickstartError(ValueError):
    """The quickstart cannot go on; the message says what to do."""


def claim(out: Path) -> None:
    """Makes the folder, or takes over that of an earlier quickstart, and marks it unfinished.

    Raises:
      QuickstartError: something else stands there.
    """
    if out.exists() and not out.is_dir():
        raise QuickstartError(f"{out}: a file stands where the quickstart's folder is to be made")
    names = sorted(os.listdir(out)) if out.is_dir() else []
    if names and not _is_ours(out):
        some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise QuickstartError(
            f"{out}: the folder is not empty ({some}) and no earlier quickstart wrote it; name "
            "another folder, as in `jaxmerge quickstart OTHER`"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_results(out, {"finished": False})


def write_results(out: Path, results: dict[str, Any]) -> None:
    """Writes `results.json`, which also marks the folder as a quickstart's."""
    text = json.dumps({"made_by": _MADE_BY, **results}, indent=2, allow_nan=False)
    write_text(out / RESULTS, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file beside its final name and renames it."""
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a name beside the final one, then renames what it wrote."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _is_ours(out: Path) -> bool:
    try:
        results = json.loads((out / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(results, dict) and results.get("made_by") == _MADE_BY
