"""`jaxmerge search`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxmerge.cli import consoles
from jaxmerge.cli.arguments import DeviceOption, Imports, Overwrite, import_all
from jaxmerge.cli.consoles import notes, say, show
from jaxmerge.cli.device import Device, use

if TYPE_CHECKING:
    from jaxmerge.search.evolve import Progress
    from jaxmerge.searching import Found

_ROWS = 12
_BLOCKS = 24


def search(
    search: Annotated[Path, typer.Argument(metavar="SEARCH", help="The search, a YAML file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of results.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from where the search in OUT has got to.")
    ] = False,
    device: DeviceOption = Device.cpu,
    overwrite: Overwrite = False,
    imports: Imports = None,
) -> None:
    """Search for the best merge: methods, blocks and hyperparameters.

    All candidates are merged and scored in one compiled program. OUT gets best-recipe.yaml, which
    `jaxmerge merge` runs, the history, plots, and for several objectives the front. A search that
    was interrupted goes on with --resume, to the same result.
    """
    began = time.monotonic()
    from jaxmerge.searching import make_task, read_search, run_search
    from jaxmerge.searching.results import BEST, write_results
    from jaxmerge.searching.running import prepare_folder, strategy_of

    use(device)
    import_all(imports)
    read = read_search(search)
    task = make_task(read)
    prepare_folder(out, search.read_text(encoding="utf-8"), resume=resume, overwrite=overwrite)
    notes([*task.plan.notes, *task.scoring.notes])
    with _table(strategy_of(task)) as progress:
        found = run_search(task, out, progress=progress)
    write_results(out, found)
    _show(found)
    say(f"\n{found.result.evaluations} candidates in {time.monotonic() - began:.1f} s")
    random = any(method.random for _, _, method in task.members.values())
    seeded = f" --seed {read.seed}" if random else ""
    say(f"Merge it: jaxmerge merge {out / BEST} OUT{seeded}")


@contextmanager
def _table(strategy: str) -> Iterator[Progress]:
    """A live table of the last generations on a terminal, else a line a minute."""
    from rich import box
    from rich.live import Live
    from rich.table import Table

    console = consoles.err()
    if not console.is_terminal:
        last = time.monotonic()

        def line(done: int, total: int, history: Any) -> None:
            nonlocal last
            if time.monotonic() - last >= 60:
                last = time.monotonic()
                best = ", ".join(f"{value:.6g}" for value in _best(history, -1))
                console.print(f"searching: generation {done} of {total}, best objective {best}")

        yield line
        return
    with Live(console=console, transient=True, refresh_per_second=4) as live:

        def update(done: int, total: int, history: Any) -> None:
            table = Table(title=f"{strategy}: generation {done} of {total}", box=box.SIMPLE_HEAD)
            for column in ("generation", "evaluations", "best", "mean", "spread", "not finite"):
                table.add_column(column, justify="right")
            for i in range(max(0, done - _ROWS), done):
                means = [history[name][i] for name in history if name.startswith("mean")]
                table.add_row(
                    str(i + 1),
                    f"{history['evaluations'][i]:.0f}",
                    ", ".join(f"{value:.6g}" for value in _best(history, i)),
                    ", ".join(f"{value:.6g}" for value in means),
                    f"{history['spread'][i]:.3f}",
                    f"{history['nonfinite'][i]:.0f}",
                )
            live.update(table)

        yield update


def _best(history: Any, i: int) -> list[float]:
    return [history[name][i] for name in history if name.startswith("best")]


def _show(found: Found) -> None:
    task = found.task
    choices = task.choices(found.points[found.best])
    rows = []
    for label, (method, _, parameters) in list(choices.items())[:_BLOCKS]:
        numbers = [
            f"{name} " + " ".join(f"{v:.4g}" for v in (x if isinstance(x, list) else [x]))
            for name, x in parameters.items()
        ]
        rows.append([label, method, ", ".join(numbers)])
    show(("block", "method", "hyperparameters"), rows)
    if len(choices) > _BLOCKS:
        say(f"... {len(choices) - _BLOCKS} more blocks")
    scores = [
        f"{name} {value:.6g}"
        for name, value in zip(task.scoring.names, found.scores[found.best], strict=True)
    ]
    if len(scores) > 1:
        scores.append(f"mean {found.scores[found.best].mean():.6g}")
    say("\nBest: " + ", ".join(scores))
    if task.objectives > 1:
        say(f"{len(found.points)} points on the front")
