"""`jaxmerge inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jaxmerge.cli.arguments import Json
from jaxmerge.cli.consoles import say, show
from jaxmerge.cli.progress import progress

if TYPE_CHECKING:
    from jaxmerge.converters.inspecting import Inspection

_SHOWN = 10


def inspect(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A file, an index or a folder, a LoRA adapter's too; FILE#KEY names the state dict inside a "
            "PyTorch file.",
        ),
    ],
    values: Annotated[
        bool,
        typer.Option(
            "--values", help="Read the tensors too: NaN, infinity, matrices that are equal."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Show what is in a checkpoint.

    Families that it fits, parameters by block, dtypes, ties; with --values what is not finite. Without it
    only headers are read.
    """
    from jaxmerge.cli.device import Device, use
    from jaxmerge.converters import split_key
    from jaxmerge.converters.inspecting import inspect_checkpoint
    from jaxmerge.recipes.output import bytes_text

    use(Device.cpu)
    path, key = split_key(checkpoint)
    with progress("reading", lambda amount: bytes_text(int(amount))) as report:
        found = inspect_checkpoint(path, key=key, values=values, progress=report)
    if json:
        typer.echo(found.to_json())
    else:
        _show(found)


def _show(found: Inspection) -> None:
    from jaxmerge.recipes.output import bytes_text

    place = f"{found.path}#{found.key}" if found.key else found.path
    files = "1 file" if found.files == 1 else f"{found.files} files"
    say(f"{place}: {found.format}, {files}, {bytes_text(found.nbytes)}")
    say(f"{found.parameters:,} parameters in {found.tensors} tensors")
    for line in (_family(found), _adapter(found)):
        if line:
            say(line)
    if found.refused:
        say(f"Cannot be merged as it is: {found.refused}")
    _show_dtypes(found)
    _show_blocks(found)
    _show_remarks(found)


def _family(found: Inspection) -> str:
    if found.families:
        return f"Family: {', '.join(found.families)}"
    if found.family_problem:
        return f"Family: none of jaxmerge.models ({found.family_problem})"
    return ""


def _adapter(found: Inspection) -> str:
    adapter = found.adapter
    if adapter is None:
        return ""
    ranks = ", ".join(map(str, adapter["ranks"]))
    scales = ", ".join(f"{scale:g}" for scale in adapter["scales"])
    line = f"LoRA adapter: {adapter['updates']} tensors, rank {ranks or 'none'}, scale {scales or 'none'}"
    if adapter["replaced"]:
        line += f"; {adapter['replaced']} tensors whole"
    if adapter["magnitudes"]:
        line += "; DoRA"
    return line + (f"; base {adapter['base_model']}" if adapter["base_model"] else "")


def _show_dtypes(found: Inspection) -> None:
    rows = [
        (name, tensors, f"{parameters:,}") for name, (tensors, parameters) in found.dtypes.items()
    ]
    say("")
    show(("dtype", "tensors", "parameters"), rows, right=("tensors", "parameters"))
    if found.quantised:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in found.quantised.items())
        say(f"Dequantised as they are read: {kinds}")


def _show_blocks(found: Inspection) -> None:
    from jaxmerge.recipes.output import bytes_text

    whole = max(sum(block.parameters for block in found.blocks), 1)
    rows = [
        (
            block.name,
            block.layers or "",
            block.tensors,
            f"{block.parameters:,}",
            f"{100 * block.parameters / whole:.1f} %",
            bytes_text(block.nbytes),
        )
        for block in found.blocks
    ]
    columns = ("block", "layers", "tensors", "parameters", "share", "size")
    say("")
    show(columns, rows, right=columns[1:])


def _show_remarks(found: Inspection) -> None:
    say("")
    for group in found.ties:
        say(f"Tied: {', '.join(group)}")
    if found.skipped:
        say(f"No tensors: {_listed([f'{n} ({kind})' for n, kind in found.skipped.items()])}")
    for group in found.equal or ():
        say(f"Equal, and not tied: {_listed(list(group))}")
    if found.non_finite is None:
        say("Values were not read (--values)")
    elif not found.non_finite:
        say("All values are finite")
    else:
        bad = [f"{name} ({count})" for name, count in found.non_finite.items()]
        say(f"NaN or infinite: {_listed(bad)}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
