"""`jaxmerge convert`."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from jaxmerge.cli.consoles import note, say
from jaxmerge.cli.progress import progress

_SHOWN = 5


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="safetensors, PyTorch or GGUF: a file, an index or a folder; an orbax folder; FILE#KEY "
            "names the state dict inside a PyTorch file.",
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="DST",
            help="A folder (of safetensors; NAME.orbax for orbax), or a file (.safetensors; .pt, .pth, "
            ".bin, .tar, .ckpt for PyTorch).",
        ),
    ],
    dtype: Annotated[
        str | None,
        typer.Option(help="Of floating-point tensors, as bfloat16; default: each as it is."),
    ] = None,
    shard_size: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="The most bytes in one file of a folder, as 5GB."),
    ] = None,
) -> None:
    """Convert a checkpoint between formats.

    Tensors are read and written piece by piece: memory does not grow with the checkpoint (to orbax and
    back a model is loaded whole). GGUF tensors are dequantised, in Hugging Face's names. From folder to
    folder the config, the tokenizer and other files go along.
    """
    from jaxmerge.converters import convert, split_key
    from jaxmerge.recipes.output import bytes_text, parse_bytes

    began = time.monotonic()
    path, key = split_key(source)
    most = None if shard_size is None else parse_bytes(shard_size)
    with progress("converting", lambda amount: bytes_text(int(amount))) as report:
        made = convert(path, target, key=key, dtype=dtype, shard_size=most, progress=report)
    if made.left_out:
        note(f"left out, as they are no tensors: {_listed(made.left_out)}")
    if made.overflowed:
        lost = [f"{name} ({count})" for name, count in made.overflowed.items()]
        note(f"values too large for {dtype}, now infinite or NaN: {_listed(lost)}")
    say(
        f"{made.path}: {made.tensors} tensors, {bytes_text(made.nbytes)} in {time.monotonic() - began:.1f} s"
    )


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
