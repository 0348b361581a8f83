"""`jaxmerge extract-lora`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from jaxmerge.cli.consoles import note, say
from jaxmerge.cli.device import Device, use
from jaxmerge.cli.progress import progress

_SHOWN = 5


def extract_lora(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The fine-tuned model.")],
    base: Annotated[str, typer.Argument(metavar="BASE", help="What it was tuned from.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The adapter's folder.")],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of the factors; with --energy, the most.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Share of each task vector's squared norm to keep, such as 0.9."),
    ] = None,
    whole: Annotated[
        bool,
        typer.Option(
            "--whole",
            help="Keep changed embeddings, heads, norms and biases whole (modules_to_save).",
        ),
    ] = False,
    dtype: Annotated[str, typer.Option(help="Of the factors.")] = "float32",
    seed: Annotated[int, typer.Option(help="Draws the subspaces for large matrices.")] = 0,
) -> None:
    """Extract a LoRA adapter from a fine-tuned model.

    Writes a folder that PEFT loads. Every changed matrix gets the best factors of what training changed;
    only one tensor of each model is in memory at a time.
    """
    began = time.monotonic()
    if rank is None and energy is None:
        raise typer.BadParameter("give --rank, or --energy, or both")
    import jax

    from jaxmerge.converters import dtypes, lora
    from jaxmerge.recipes.output import bytes_text

    use(Device.cpu)
    lora.check_adapter_folder(out)
    dtypes.floating_dtype(dtype)
    with progress("extracting", lambda amount: bytes_text(int(amount))) as report:
        found = lora.extract_lora(
            model,
            base,
            rank=rank,
            energy=energy,
            whole=whole,
            key=jax.random.key(seed),
            progress=report,
        )
    lora.save_lora(out, found.adapter, dtype=dtype)
    if found.left_out:
        more = f" and {len(found.left_out) - _SHOWN} more" if len(found.left_out) > _SHOWN else ""
        note(
            f"changed, and not in the adapter (--whole): {', '.join(found.left_out[:_SHOWN])}{more}"
        )
    ranks = sorted(rank for rank, _ in found.kept.values())
    spread = (
        "no"
        if not ranks
        else f"{ranks[0]}"
        if ranks[0] == ranks[-1]
        else f"{ranks[0]} to {ranks[-1]}"
    )
    also = f", {len(found.adapter.replaced)} tensors whole" if found.adapter.replaced else ""
    say(
        f"{out}: {len(ranks)} matrices of rank {spread}{also}; {found.energy:.1%} of the squared norm of "
        f"what training changed, in {time.monotonic() - began:.1f} s"
    )
