"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from jaxmerge.cli.device import Device

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Seed = Annotated[int, typer.Option(help="Seed of random methods.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to compute.")]
Json = Annotated[bool, typer.Option("--json", help="Write JSON to stdout, and nothing else.")]
Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        help="A module or .py file to import first: it registers methods of your own.",
    ),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        "--memory-limit",
        metavar="BYTES",
        help="The most memory to hold: 1GiB, 512MB, 50%. Default: three quarters of what is free.",
    ),
]


def import_all(sources: list[str] | None) -> None:
    """Imports the modules that register a user's methods."""
    from jaxmerge.sweeping import import_source

    for source in sources or ():
        import_source(source)
