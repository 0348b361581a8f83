"""Progress on stderr: a bar on a terminal, else one plain line a minute."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as bars

from jaxmerge.cli import consoles

Report = Callable[[int, int], None]
Unit = Callable[[float], str]


@contextmanager
def progress(
    task: str,
    unit: Unit,
    *,
    silent: bool = False,
    every: float = 60.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Report]:
    """Gives a function to be called with what is done and the total.

    Args:
        task: what is going on, as "merging".
        unit: writes an amount.
        silent: say nothing.
        every: seconds between lines where there is no terminal.
        clock: seconds.
    """
    console = consoles.err()
    if silent:
        yield lambda done, total: None
        return
    if not console.is_terminal:
        yield _lines(task, unit, every, clock)
        return
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.TextColumn("{task.fields[amount]}"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console, transient=True) as bar:
        identifier = bar.add_task(task, total=None, amount="")

        def report(done: int, total: int) -> None:
            amount = f"{unit(done)} of {unit(total)}"
            bar.update(identifier, completed=done, total=max(total, 1), amount=amount)

        yield report


def _lines(task: str, unit: Unit, every: float, clock: Callable[[], float]) -> Report:
    began = last = clock()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = clock()
        if now - last < every:
            return
        last = now
        share = 100 * done / max(total, 1)
        consoles.err().print(
            f"{task}: {unit(done)} of {unit(total)} ({share:.0f} %), {now - began:.0f} s",
            soft_wrap=True,
        )

    return report
