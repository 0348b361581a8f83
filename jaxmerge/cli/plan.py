"""`jaxmerge plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jaxmerge.cli.arguments import (
    Imports,
    Json,
    MemoryLimit,
    Overwrite,
    RecipePath,
    Seed,
    import_all,
)
from jaxmerge.cli.consoles import say, show
from jaxmerge.cli.device import Device, use

if TYPE_CHECKING:
    from jaxmerge.recipes import Plan

# A table of more rows shows its first and last ones.
_ROWS = 40


def plan(
    recipe: RecipePath,
    out: Annotated[
        str | None,
        typer.Argument(metavar="[OUT]", help="Where the merge will go; checked if given."),
    ] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    json: Json = False,
    all_rows: Annotated[bool, typer.Option("--all", help="List every tensor.")] = False,
    memory_limit: MemoryLimit = None,
    imports: Imports = None,
) -> None:
    """Show what a merge will do; reads headers only.

    Tensors, shapes, dtypes, names without a match, bytes, the memory needed, and where the result
    will differ from mergekit's.
    """
    from jaxmerge.recipes import make_plans, read_all
    from jaxmerge.recipes.remote import check_free, is_remote
    from jaxmerge.recipes.several import FINAL
    from jaxmerge.recipes.streaming.memory import parse_limit

    use(Device.cpu)
    import_all(imports)
    limit = None if memory_limit is None else parse_limit(memory_limit)
    elsewhere = out is not None and is_remote(out)
    plans = make_plans(
        read_all(recipe),
        out=None if elsewhere else out,
        overwrite=overwrite,
        seed=seed,
        memory_limit=limit,
    )
    if out is not None and elsewhere:
        check_free(out, plans[-1].fingerprint, overwrite=overwrite)
    if json:
        texts = [made.to_json() for made in plans]
        typer.echo(texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]")
        return
    for number, made in enumerate(plans):
        if len(plans) > 1:
            say(f"{chr(10) if number else ''}Merge: {made.resolved.recipe.name or FINAL}\n")
        _show(made, all_rows)


def _show(made: Plan, all_rows: bool) -> None:
    _show_method(made)
    _show_sources(made)
    _show_tensors(made, all_rows)
    _show_amounts(made)
    differences, others = _sorted_notes(made)
    for heading, texts in (("Notes", others), ("Where mergekit differs", differences)):
        if texts:
            say(f"\n{heading}:")
            for text in texts:
                say(f"  {text}")


def _show_method(made: Plan) -> None:
    resolved = made.resolved
    values = ", ".join(f"{name} {_shown(v)}" for name, v in resolved.hyperparameters.items())
    options = ", ".join(f"{name}={value}" for name, value in resolved.options.items())
    say(f"Method: {resolved.method.name}" + (f" ({options})" if options else ""))
    say(f"Hyperparameters: {values or 'none'}")
    say(f"Dialect: {resolved.recipe.dialect}; seed: {made.seed}")
    if made.alignment is not None:
        say(f"Aligns first: {made.alignment.describe(made.sources)}")


def _show_sources(made: Plan) -> None:
    from jaxmerge.recipes.output import bytes_text

    rows = []
    for i, source in enumerate(made.sources):
        roles = ["base"] if i == made.base else []
        roles += [f"model {k}" for k, index in enumerate(made.models) if index == i]
        path = f"{source.path}#{source.key}" if source.key else source.path
        row = (", ".join(roles), path, source.format, len(source.tensors))
        rows.append((*row, bytes_text(source.nbytes)))
    say("")
    show(("role", "path", "format", "tensors", "size"), rows, right=("tensors", "size"))


def _show_tensors(made: Plan, all_rows: bool) -> None:
    rows = [tuple(row.values()) for row in made.describe()]
    columns = tuple(made.describe()[0]) if rows else ()
    hidden = 0 if all_rows else max(0, len(rows) - _ROWS)
    if hidden:
        head, tail = rows[: _ROWS // 2], rows[-(_ROWS // 2) :]
        dots = (f"... {hidden} more (--all)", *[""] * (len(columns) - 1))
        rows = [*head, dots, *tail]
    say("")
    show(columns, rows)


def _show_amounts(made: Plan) -> None:
    from jaxmerge.free_memory import available_memory
    from jaxmerge.recipes.output import bytes_text

    merged = sum(tensor.action == "merge" for tensor in made.tensors)
    say(f"\nTensors: {merged} merged, {len(made.tensors) - merged} carried over")
    for group in made.ties:
        say(f"Tied: {', '.join(group)}")
    read, written = bytes_text(made.bytes_read), bytes_text(made.bytes_written)
    say(f"Reads {read}, writes {written}" + (f" to {made.output}" if made.output else ""))
    free = available_memory()
    beside = f" ({bytes_text(free)} free)" if free is not None else ""
    say(f"Memory needed: {bytes_text(made.memory)}{beside}")
    if made.resumes:
        say("Resumes an unfinished run of this plan")


def _sorted_notes(made: Plan) -> tuple[list[str], list[str]]:
    """Returns what sets the result apart from mergekit's, and the other notes."""
    differences = [text for text in made.notes if "mergekit" in text]
    others = [text for text in made.notes if "mergekit" not in text]
    if made.resolved.recipe.dialect == "mergekit" and made.resolved.method.random:
        differences.append(
            f"{made.resolved.method.name} draws other random numbers than mergekit's, of the same "
            f"distribution; here seed {made.seed} gives them again"
        )
    return differences, others


def _shown(value: float | list[float]) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return f"{value:g}"
