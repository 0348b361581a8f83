"""`jaxmerge sweep`."""

from __future__ import annotations

import json as json_text
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxmerge.cli.arguments import (
    DeviceOption,
    Imports,
    Json,
    Overwrite,
    RecipePath,
    Seed,
    import_all,
)
from jaxmerge.cli.consoles import note, notes, say, show
from jaxmerge.cli.device import Device, use
from jaxmerge.cli.progress import progress

if TYPE_CHECKING:
    from jaxmerge.sweeping import Sweep

_ROWS = 20
_PARTS = 8


def sweep(
    recipe: RecipePath,
    grid: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=VALUES",
            help="An axis: density=0.1:1:8 (start:stop:count), scale=0.5,1,2, or weight[0]=0,1 for "
            "one model. Several axes give all combinations.",
        ),
    ],
    evaluate: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE:FUNCTION",
            help="module:function or file.py:function, from the merged tensors by name to a score "
            "(or one per task, whose mean counts); more is better.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Gets best-recipe.yaml, results.csv and results.json."),
    ] = None,
    seed: Seed = 0,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Points merged at once; default: as memory allows."),
    ] = None,
    device: DeviceOption = Device.cpu,
    overwrite: Overwrite = False,
    json: Json = False,
    imports: Imports = None,
) -> None:
    """Merge and score every point of a grid; show the best recipe.

    One compiled program makes and scores all candidates; no merged model is written. What the grid
    does not name stays as in the recipe. Without --evaluate the score is a proxy that needs no
    data: the smallest cosine between the merged task vector and a source's.
    """
    began = time.monotonic()
    from jaxmerge.recipes import dump, make_plan, read
    from jaxmerge.sweeping import load_evaluator, make_grid, parse_axis
    from jaxmerge.sweeping import sweep as run_sweep
    from jaxmerge.sweeping.results import check_folder, to_dict, write

    use(device)
    import_all(imports)
    if out is not None:
        check_folder(out, overwrite)
    made = make_grid(read(recipe), [parse_axis(text) for text in grid])
    evaluator = None if evaluate is None else load_evaluator(evaluate)
    plan = make_plan(made.resolved, seed=seed)
    notes(plan.notes)
    with progress("sweeping", lambda amount: f"{amount:.0f} points") as report:
        found = run_sweep(made, plan, evaluator, batch=batch, progress=report)
    notes(found.notes)
    if out is not None:
        write(out, found, plan)
    if json:
        typer.echo(json_text.dumps(to_dict(found, plan), indent=2, allow_nan=False))
        return
    _show(found)
    count = len(found.scores)
    how = f"one program for {found.batch} at a time" if found.compiled else "on the host"
    say(f"\n{count} points in {time.monotonic() - began:.1f} s ({how})")
    if found.kind == "balance":
        note(
            "the score is a proxy, made without data: the smallest cosine between the merge and a "
            "source; --evaluate gives a score of your own"
        )
    say(f"Best: {_point(found, found.best)}, score {found.scores[found.best]:.6g}")
    if out is None:
        say(f"\n{dump(found.grid.recipe(found.best)).rstrip()}")
    else:
        seeded = f" --seed {seed}" if plan.resolved.method.random else ""
        say(f"Merge it: jaxmerge merge {out / 'best-recipe.yaml'} OUT{seeded}")


def _show(found: Sweep) -> None:
    from jaxmerge.sweeping.results import part_names

    parts = part_names(found)
    shown = parts if 1 < len(parts) <= _PARTS else ()
    score = "score (proxy)" if found.kind == "balance" else "score"
    rows = []
    for rank, index in enumerate(found.order[:_ROWS], start=1):
        values = [f"{value:.6g}" for value in found.grid.points[index]]
        cells = [f"{part:.6g}" for part in found.parts[index]] if shown else []
        rows.append([rank, *values, f"{found.scores[index]:.6g}", *cells])
    columns = ("rank", *found.grid.labels, score, *shown)
    show(columns, rows, right=columns)
    if len(found.scores) > _ROWS:
        say(f"... {len(found.scores) - _ROWS} more points")


def _point(found: Sweep, index: int) -> str:
    values = zip(found.grid.labels, found.grid.points[index], strict=True)
    return ", ".join(f"{label} {value:.6g}" for label, value in values)
