"""Whether a merge may write where it is told to: nothing is lost, and there is room."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from jaxmerge.converters.folder import GGUF_SUFFIX, SAFETENSORS_SUFFIX, TORCH_SUFFIXES, locate
from jaxmerge.converters.orbax_converting import SUFFIX as ORBAX_SUFFIX
from jaxmerge.converters.partial_file import SUFFIX as PARTIAL_SUFFIX
from jaxmerge.recipes.journal import head_of

# An output folder has this journal until it is whole; further processes have their number in it.
UNFINISHED = "jaxmerge-unfinished.jsonl"
# A finished one has this record, and where models were aligned the permutations.
RECORD = "jaxmerge.json"
ALIGNMENT = "alignment.json"
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>([kmgt](i?b)?|b)?)", re.IGNORECASE)


def is_file(output: Path) -> bool:
    """Whether the name is that of one checkpoint file, not of a folder.

    >>> is_file(Path("out/model.safetensors")), is_file(Path("out"))
    (True, False)
    """
    return output.suffix == SAFETENSORS_SUFFIX or output.suffix in TORCH_SUFFIXES


def journal_of(output: Path, process: int = 0) -> Path:
    """Returns where the journal of an unfinished output stands.

    >>> journal_of(Path("out")).name, journal_of(Path("out.safetensors")).name
    ('jaxmerge-unfinished.jsonl', 'out.safetensors.unfinished.jsonl')
    >>> journal_of(Path("out"), 1).name
    'jaxmerge-unfinished.1.jsonl'
    """
    number = f".{process}" if process else ""
    if is_file(output):
        return output.with_name(f"{output.name}.unfinished{number}.jsonl")
    return output / UNFINISHED.replace(".", f"{number}.")


def is_journal(name: str) -> bool:
    """Whether a file in an output folder is a journal of an unfinished run."""
    return name.startswith("jaxmerge-unfinished.") and name.endswith(".jsonl")


def contents(folder: Path) -> list[str]:
    """Returns the names in a folder, without journals of unfinished runs."""
    return sorted(name for name in os.listdir(folder) if not is_journal(name))


def replacement_of(output: Path) -> Path:
    """Returns the folder beside an output folder in which its replacement comes to be."""
    return output.with_name(f".{output.name}.partial")


def is_unfinished(output: Path, fingerprint: str) -> bool:
    """Whether an unfinished run of the plan with this fingerprint stands there, or beside it."""
    beside = [] if is_file(output) else [replacement_of(output)]
    return fingerprint in [left_by(place) for place in (output, *beside)]


def is_finished(output: Path, fingerprint: str) -> bool:
    """Whether the folder is the whole result of the plan with this fingerprint."""
    if is_file(output) or journal_of(output).exists():
        return False
    try:
        locate(os.fspath(output))
        record = json.loads((output / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("fingerprint") == fingerprint


def left_by(output: Path) -> str | None:
    """Returns the fingerprint of the plan whose unfinished run stands there, or None."""
    head = head_of(journal_of(output))
    return None if head is None else str(head.get("fingerprint", ""))


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
    if output.suffix in (GGUF_SUFFIX, ORBAX_SUFFIX):
        return [
            f"{output}: a merge is written as safetensors or PyTorch, not as {output.suffix[1:]}"
        ]
    for source in sources:
        if _covers(output, source):
            return [f"{output}: the output would overwrite the source {source}"]
    if fingerprint is not None:
        if not overwrite and is_finished(output, fingerprint):
            return []
        if is_unfinished(output, fingerprint):
            nbytes -= _allocated(output)
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
        if fingerprint is not None and left_by(output) == fingerprint:
            return None
        return f"{output}: the output file exists; name another one, or give --overwrite"
    names, left = contents(output), left_by(output)
    if not names or (left is not None and fingerprint in (None, left)):
        return None
    what = "is not empty" if left is None else "holds an unfinished run of another plan"
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"{output}: the output folder {what} ({some}); name another one, or give --overwrite to "
        "replace what is there"
    )


def _allocated(output: Path) -> int:
    """Returns the bytes that an unfinished run has taken on the disk already."""
    if is_file(output):
        files = [output.with_name(output.name + PARTIAL_SUFFIX)]
    else:
        files = [file for folder in (output, replacement_of(output)) for file in folder.rglob("*")]
    return sum(file.stat().st_blocks * 512 for file in files if file.is_file())


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


def parse_bytes(text: str) -> int:
    """Reads a size: a number and a unit. K, M, G and T are powers of 1000, KiB and so on of 1024.

    As in mergekit's options, B alone stands for 10^9.

    Args:
        text: such as "5GB", "500MB", "2GiB", "5B" or "100000".

    Raises:
        ValueError: text that is no size, or a size below 1.

    >>> parse_bytes("5GB"), parse_bytes("5B"), parse_bytes("1.5KiB"), parse_bytes("12")
    (5000000000, 5000000000, 1536, 12)
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"expected a size such as 5GB or 500MB, found {text!r}")
    unit = match["unit"].upper()
    power = "KMGT".find(unit[:1]) + 1 if unit and unit != "B" else 0
    base = 1024 if "I" in unit else 1000
    size = int(float(match["number"]) * (10**9 if unit == "B" else base**power))
    if size < 1:
        raise ValueError(f"expected a size of at least one byte, found {text!r}")
    return size


def _covers(output: Path, source: Path) -> bool:
    output, source = output.resolve(), source.resolve()
    return output == source or output in source.parents
