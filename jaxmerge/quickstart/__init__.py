"""The embedded default job: real digits, three experts, and every way to make one model of them."""

from jaxmerge.quickstart.evaluation import evaluate
from jaxmerge.quickstart.folder import QuickstartError
from jaxmerge.quickstart.job import run_quickstart
from jaxmerge.quickstart.result import QuickstartResult, Row

__all__ = ["QuickstartError", "QuickstartResult", "Row", "evaluate", "run_quickstart"]
