"""Searches as files: SEARCH.yaml, what it means, and the folder of results."""

from jaxmerge.searching.running import Found, run_search
from jaxmerge.searching.schema import SearchFile, read_search
from jaxmerge.searching.task import Task, make_task

__all__ = ["Found", "SearchFile", "Task", "make_task", "read_search", "run_search"]
