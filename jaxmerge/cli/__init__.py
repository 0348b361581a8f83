"""The command line; `jaxmerge --help` lists the commands."""

import signal
import sys
from types import FrameType
from typing import NoReturn


def main() -> None:
    """Runs the command line; never returns."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        from jaxmerge.cli.app import app

        app(prog_name="jaxmerge")
    except KeyboardInterrupt:
        # Before a command has begun.
        sys.exit(130)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    # Unwinds the stack, so that what was begun is removed.
    raise SystemExit(128 + number)
