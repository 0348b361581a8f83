"""Where an output comes to be: locked, resumable, and in nobody's way until it is whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxmerge.converters.folder import weight_files
from jaxmerge.converters.partial_file import SUFFIX as PARTIAL_SUFFIX
from jaxmerge.recipes.errors import PlanError
from jaxmerge.recipes.journal import Head, Journal, locked
from jaxmerge.recipes.output import (
    contents,
    is_file,
    is_journal,
    journal_of,
    left_by,
    replacement_of,
)


@dataclass(frozen=True)
class Workplace:
    """An output that is being made.

    Attributes:
        output: the name that it will have.
        target: the name under which it is written until then: the same, or for a folder that
            replaces another one a folder beside.
        journal: what is finished; holds the lock.
    """

    output: Path
    target: Path
    journal: Journal


@contextlib.contextmanager
def workplace(output: Path, head: Head, overwrite: bool, process: int = 0) -> Iterator[Workplace]:
    """Gives the place to write to, and makes it the output at the end.

    A new folder is written in place, under a journal that says unfinished. A folder or file that is
    to be replaced stays whole until the new one is. After an error that is no fault of the sources
    (a full disk, a lost connection, an interruption) what is finished stays, and the same merge goes
    on with it; else what was begun is removed.

    Args:
        output: a folder or a checkpoint file.
        head: what decides the output's bytes; has "fingerprint".
        overwrite: what is there may be replaced.
        process: of several that write one output. The first one makes the place, before the others
            come, and the output, after they have gone.

    Raises:
        PlanError: another process writes there, or has written there since the plan was made.
    """
    target = _target(output, head["fingerprint"])
    folder = output.parent if is_file(output) else target
    made = not folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if target != output and journal_of(output).exists():
            stack.enter_context(locked(journal_of(output)))
        journal = stack.enter_context(Journal(journal_of(target, process), head))
        place = Workplace(output, target, journal)
        if process == 0:
            _prepare(place, overwrite)
        try:
            yield place
        except BaseException as error:
            finished = place.journal.tensors or place.journal.alignments
            if process == 0 and not (finished and _can_go_on(error)):
                _remove(place, made)
            elif isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(_kept(output)) from None
            else:
                error.add_note(_kept(output))
            raise
        if process == 0:
            _finish(place)


def journals(place: Workplace) -> list[Path]:
    """Returns the journals of all processes that have written there."""
    first = place.journal.path
    if is_file(place.output):
        return [first]
    return sorted(file for file in first.parent.iterdir() if is_journal(file.name))


def _target(output: Path, fingerprint: str) -> Path:
    if is_file(output):
        return output
    beside = replacement_of(output)
    if left_by(beside) == fingerprint:
        return beside
    mine = left_by(output) == fingerprint
    return beside if output.is_dir() and contents(output) and not mine else output


def _prepare(place: Workplace, overwrite: bool) -> None:
    """Leaves in the place only what an earlier run of the same merge has left, and its files partial."""
    output, journal = place.output, place.journal
    if (
        journal.fresh
        and not overwrite
        and (output.exists() if is_file(output) else place.target != output or contents(output))
    ):
        journal.remove()
        if place.target != output:
            place.target.rmdir()
        raise PlanError([f"{output}: was written by another run since the plan was made"])
    if is_file(output):
        return
    if journal.resumed:
        for name in weight_files(os.fspath(place.target)):
            (place.target / name).rename(_partial(place.target / name))
        return
    for name in set(os.listdir(place.target)) - {journal.path.name}:
        _delete(place.target / name)


def _finish(place: Workplace) -> None:
    if place.target != place.output:
        old = place.output.with_name(f".{place.output.name}.replaced")
        if place.output.exists():
            _delete(old)
            place.output.rename(old)
        place.target.rename(place.output)
        place.journal.moved(journal_of(place.output))
    if is_file(place.output):
        _partial(place.output).unlink(missing_ok=True)
    else:
        _delete(place.output.with_name(f".{place.output.name}.replaced"))
    for path in journals(place):
        if path != place.journal.path:
            path.unlink()
    place.journal.remove()


def _remove(place: Workplace, made: bool) -> None:
    """Removes what was begun; the folder too, if it was made for it."""
    if is_file(place.output):
        _partial(place.output).unlink(missing_ok=True)
        place.journal.remove()
        return
    for name in set(os.listdir(place.target)) - {place.journal.path.name}:
        _delete(place.target / name)
    place.journal.remove()
    if made:
        place.target.rmdir()


def _can_go_on(error: BaseException) -> bool:
    """Whether the same merge may succeed later: nothing is wrong with its input."""
    if not isinstance(error, ValueError):
        return True
    return isinstance(error.__cause__ or error.__context__, OSError)


def _kept(output: Path) -> str:
    return f"{output} is unfinished; the same command goes on where it stopped"


def _partial(file: Path) -> Path:
    return file.with_name(file.name + PARTIAL_SUFFIX)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
