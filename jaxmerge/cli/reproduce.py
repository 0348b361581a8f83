"""`jaxmerge reproduce`."""

from __future__ import annotations

import json as json_text
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from jaxmerge.cli.arguments import DeviceOption, Imports, Json, import_all
from jaxmerge.cli.consoles import notes, say, show
from jaxmerge.cli.device import Device, use
from jaxmerge.cli.failures import FAILED
from jaxmerge.cli.progress import progress

# Of the tensors that differ.
_ROWS = 10


def reproduce(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A folder or safetensors file that merge wrote.")
    ],
    source: Annotated[
        list[str] | None,
        typer.Option(metavar="OLD=NEW", help="A source of the recipe, and where it is now."),
    ] = None,
    device: DeviceOption = Device.cpu,
    json: Json = False,
    imports: Imports = None,
) -> None:
    """Make the merge that gave OUT again, and compare bit for bit.

    Recipe and seed are those that OUT records. Tensors are compared as they are merged; nothing is
    written beside OUT. Ends with exit code 1 if something differs.
    """
    began = time.monotonic()
    from jaxmerge.recipes import reproduce as compare
    from jaxmerge.recipes.output import bytes_text

    use(device)
    import_all(imports)
    with progress("comparing", lambda amount: bytes_text(int(amount))) as report:
        found = compare(
            out,
            sources=dict(_pair(text) for text in source or ()),
            progress=lambda name, done, total: report(done, total),
        )
    notes(found.notes)
    if json:
        typer.echo(json_text.dumps({"equal": found.equal, **asdict(found)}, indent=2))
    elif found.equal:
        seconds = time.monotonic() - began
        say(f"{out}: all {found.tensors} tensors are made again bit for bit, in {seconds:.1f} s")
    else:
        rows = [
            (
                one.name,
                "all: missing, or of another shape" if one.entries is None else one.entries,
                f"{one.largest:g}",
            )
            for one in found.differences[:_ROWS]
        ]
        if rows:
            show(("tensor", "entries that differ", "largest difference"), rows)
        say(f"{out}: {len(found.differences)} of {found.tensors} tensors differ")
        for file in found.files:
            say(f"{out / file}: differs")
    if not found.equal:
        raise typer.Exit(FAILED)


def _pair(text: str) -> tuple[str, str]:
    old, mark, new = text.partition("=")
    if not (old and mark and new):
        raise ValueError(f"--source {text}: expected OLD=NEW")
    return old, new
