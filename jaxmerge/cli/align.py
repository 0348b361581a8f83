"""`jaxmerge align`."""

import enum
import json as json_text
import time
from pathlib import Path
from typing import Annotated

import typer

from jaxmerge.cli.arguments import DeviceOption, Json
from jaxmerge.cli.consoles import note, say, show
from jaxmerge.cli.device import Device, use


class Method(enum.StrEnum):
    """What units are compared by."""

    weight = "weight"
    activation = "activation"
    dual = "dual"


def align(
    a: Annotated[str, typer.Argument(metavar="A", help="The model that stays as it is.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The model whose units are reordered.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of B in the order of A.")],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="X.npz",
            help="Inputs as the model takes them, .npz or .npy; images as [n, height, width, channels].",
        ),
    ] = None,
    method: Annotated[Method, typer.Option(help="What units are compared by.")] = Method.dual,
    alpha: Annotated[
        float, typer.Option(help="Share of the weights in the dual similarity, 0 to 1.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the orders in which layers are visited.")] = 0,
    restarts: Annotated[
        int, typer.Option(min=1, help="How many matchings are made; the best counts.")
    ] = 1,
    family: Annotated[
        str | None, typer.Option(help="Of both models, where the checkpoints do not tell.")
    ] = None,
    device: DeviceOption = Device.cpu,
    json: Json = False,
) -> None:
    """Bring the units of model B into the order of model A's.

    Models that were trained apart are averaged well only when their units correspond. OUT is B with
    its units reordered, the same function; merge it with A by any recipe. What may be reordered is
    found from the model's program. The permutations stand in OUT/alignment.json.
    """
    began = time.monotonic()
    use(device)
    from jaxmerge.align.checkpoints import How, align_checkpoints

    how = How(method.value, alpha, seed, restarts)
    found = align_checkpoints(a, b, out, how, data=data, family=family)
    if json:
        typer.echo(json_text.dumps(found.record, indent=2, allow_nan=False))
        return
    rows = [[name, f"{value:.4f}"] for name, value in found.record["similarity"].items()]
    show(("units", "similarity"), rows, right=("similarity",))
    if not found.record["settled"]:
        note("the matching had not settled when it stopped; the best of its sweeps is taken")
    say(
        f"{out}: mean similarity {found.record['score']:.4f} after {found.record['sweeps']} sweeps, "
        f"in {time.monotonic() - began:.1f} s"
    )
