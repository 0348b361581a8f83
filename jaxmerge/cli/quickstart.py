"""`jaxmerge quickstart`."""

from pathlib import Path
from typing import Annotated

import typer

from jaxmerge.cli.arguments import Seed


def quickstart(
    out: Annotated[
        Path, typer.Argument(metavar="[OUT]", help="Where the checkpoints and the plot go.")
    ] = Path("jaxmerge-quickstart"),
    seed: Seed = 0,
) -> None:
    """Train, merge and compare small experts on handwritten digits.

    Takes about a minute on two cores and needs nothing but the package.
    """
    raise NotImplementedError
