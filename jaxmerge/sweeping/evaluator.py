"""Evaluators and plug-ins by name: `package.module:function`, `file.py:function`."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxmerge.tree import nearest

Evaluator = Callable[[dict[str, Any]], Any]


class EvaluatorError(ValueError):
    """A user's module or evaluator cannot be imported, or fails."""


def load_evaluator(text: str) -> Evaluator:
    """Imports an evaluator.

    Args:
        text: `module:function` or `file.py:function`. Modules are looked for in the working
            directory too, a file's own imports beside the file.

    Returns:
        The function: it takes the merged tensors by checkpoint name and returns a score, or one
        score per task; more is better.

    Raises:
        EvaluatorError: another form, no such file, module or function, or an error while importing.

    >>> load_evaluator("math:fsum")([1.0, 2.0])
    3.0
    """
    source, colon, name = text.rpartition(":")
    if not colon or not source or not name:
        raise EvaluatorError(f"--evaluate {text}: expected module:function or file.py:function")
    module = import_source(source)
    function = getattr(module, name, None)
    if function is None:
        known = [key for key, value in vars(module).items() if callable(value)]
        raise EvaluatorError(f"{source} has no function {name!r}{nearest(name, known)}")
    if not callable(function):
        raise EvaluatorError(f"{text} is no function but a {type(function).__name__}")
    return function


def import_source(source: str) -> ModuleType:
    """Imports a module by its dotted name, or a `.py` file by its path.

    Raises:
        EvaluatorError: it is not there, or raises.
    """
    if source.endswith(".py"):
        path = Path(source).expanduser().resolve()
        if not path.is_file():
            raise EvaluatorError(f"no such file: {source}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        _importable(path.parent)
        _guarded(source, lambda: spec.loader.exec_module(module))  # type: ignore[union-attr]
        return module
    _importable(Path.cwd())
    return _guarded(source, lambda: importlib.import_module(source))


def _guarded(source: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == source
        text = "no such module" if missing else f"{type(error).__name__}: {error}"
        raise EvaluatorError(f"importing {source} failed: {text}") from error


def _importable(folder: Path) -> None:
    if os.fspath(folder) not in sys.path:
        sys.path.insert(0, os.fspath(folder))
