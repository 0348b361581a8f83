"""`jaxmerge merge`."""

from __future__ import annotations

import enum
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxmerge.cli.allocator import keep_freed_memory
from jaxmerge.cli.arguments import (
    DeviceOption,
    Imports,
    MemoryLimit,
    Overwrite,
    RecipePath,
    Seed,
    import_all,
)
from jaxmerge.cli.consoles import note, notes, say
from jaxmerge.cli.device import Device, use
from jaxmerge.cli.progress import progress

if TYPE_CHECKING:
    from jaxmerge.recipes import Plan


class Format(enum.StrEnum):
    """A format of checkpoints."""

    safetensors = "safetensors"
    torch = "torch"


def merge(
    recipe: RecipePath,
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT",
            help="A folder, or a file (.safetensors; .pt, .pth, .bin, .tar for PyTorch); gs:// and "
            "the like too.",
        ),
    ],
    seed: Seed = 0,
    overwrite: Overwrite = False,
    device: DeviceOption = Device.cpu,
    format: Annotated[
        Format | None,
        typer.Option(help="Of the output; default: by OUT's name, a folder being safetensors."),
    ] = None,
    shard_size: Annotated[
        str,
        typer.Option(
            "--shard-size",
            "--out-shard-size",
            metavar="BYTES",
            help="The most bytes of tensors in one file of a folder: 5B, 5GB, 500MB.",
        ),
    ] = "5GB",
    memory_limit: MemoryLimit = None,
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            help="One of several processes that merge together, each its share of the files; the "
            "cluster is found by JAX, or given by the next three options.",
        ),
    ] = False,
    coordinator: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Of the first process.")
    ] = None,
    process_id: Annotated[int | None, typer.Option(min=0, help="Of this process.")] = None,
    num_processes: Annotated[int | None, typer.Option(min=1, help="In all.")] = None,
    imports: Imports = None,
) -> None:
    """Merge the checkpoints of a recipe; of each recipe, where the file has several.

    All that headers tell is checked before a tensor is read, every tensor for NaN and infinity as
    it is read. A merge that was interrupted, killed or short of disk is gone on with by the same
    command. A folder also gets the recipe as it ran, where everything came from, a model card, and
    the other files of the base (or of the first model). Of several recipes each is written to
    OUT/NAME, the one without a name to OUT/final.
    """
    from jaxmerge.recipes import make_plans, read_all, run
    from jaxmerge.recipes.output import parse_bytes
    from jaxmerge.recipes.processes import ALONE, connect
    from jaxmerge.recipes.remote import check_free, is_remote, publish, staged
    from jaxmerge.recipes.streaming.memory import parse_limit

    several = distributed or {coordinator, process_id, num_processes} != {None}
    processes = connect(coordinator, process_id, num_processes) if several else ALONE
    use(device)
    keep_freed_memory()
    import_all(imports)
    with processes.together():
        # One process speaks for all; errors are each process's own.
        loud = processes.index == 0
        remote = is_remote(out)
        if remote and processes.count > 1:
            raise ValueError(f"{out}: several processes need a folder that they share")
        limit = None if memory_limit is None else parse_limit(memory_limit)
        place = staged(out) if remote else Path(out)
        plans = make_plans(
            read_all(recipe), out=place, overwrite=overwrite, seed=seed, memory_limit=limit
        )
        if remote:
            check_free(out, plans[-1].fingerprint, overwrite=overwrite)
        for plan in plans:
            assert plan.output is not None
            shown = out + str(plan.output).removeprefix(str(place))
            if loud:
                notes(plan.notes)
            if plan.done:
                if loud and not remote:
                    say(f"{shown}: is the result of this merge already; --overwrite makes it again")
                continue
            if plan.resumes and loud:
                note(f"goes on with the unfinished run in {shown}")
            if plan.alignment is not None and loud:
                note(f"aligns first: {plan.alignment.describe(plan.sources)}")
            began = time.monotonic()
            with progress("merging", _bytes, silent=not loud) as report:
                run(
                    plan,
                    format=None if format is None else format.value,
                    shard_size=parse_bytes(shard_size),
                    memory_limit=limit,
                    progress=lambda name, done, total: report(done, total),
                    processes=processes,
                )
            if loud:
                _tell(plan, shown, time.monotonic() - began)
        if remote:
            publish(place, out, plans[-1].fingerprint)


def _bytes(amount: float) -> str:
    from jaxmerge.recipes.output import bytes_text

    return bytes_text(int(amount))


def _tell(plan: Plan, shown: str, seconds: float) -> None:
    merged = sum(tensor.action == "merge" for tensor in plan.tensors)
    carried = len(plan.tensors) - merged
    methods = sorted({merge.method.name for merge in plan.merges})
    say(
        f"{shown}: {merged} tensors merged by {', '.join(methods)}"
        + (f", {carried} carried over" if carried else "")
        + f"; {_bytes(plan.bytes_written)} in {seconds:.1f} s"
    )
