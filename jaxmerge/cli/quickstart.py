"""`jaxmerge quickstart`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from jaxmerge.cli.arguments import DeviceOption, Seed
from jaxmerge.cli.consoles import err, say, show
from jaxmerge.cli.device import Device, use


def quickstart(
    out: Annotated[
        Path, typer.Argument(metavar="[OUT]", help="Where checkpoints, recipes and the plot go.")
    ] = Path("jaxmerge-quickstart"),
    seed: Seed = 0,
    device: DeviceOption = Device.cpu,
) -> None:
    """Train, merge and compare small experts on handwritten digits.

    Takes about a minute on two cores and needs nothing but the package.
    """
    began = time.monotonic()
    from jaxmerge.quickstart import run_quickstart

    use(device)
    result = run_quickstart(out, seed=seed, report=lambda line: err().print(line, soft_wrap=True))
    say("")
    show(result.header, result.cells(), right=result.header[1:])
    say(f"\n{result.summary}")
    again = f" --seed {seed}" if seed else ""
    say(f"\n{result.folder}: everything, plot.png included, in {time.monotonic() - began:.0f} s")
    say(f"The best again: jaxmerge merge {out / 'recipes' / 'best.yaml'} OUT{again}")
