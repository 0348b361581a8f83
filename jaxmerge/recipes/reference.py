"""How a recipe names a model: `path`, `path#nested.key`, `path@revision`, `path+adapter`."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from jaxmerge.converters import split_key
from jaxmerge.recipes.hub import is_hub_name, snapshot
from jaxmerge.recipes.remote import fetch, is_remote

_FIELDS = ("model", "lora")


@dataclass(frozen=True)
class ModelReference:
    """A model as a recipe names it.

    Attributes:
        path: a file or folder.
        key: for a checkpoint that holds its tensors deeper: the key of the nested state dict.
        revision: of a model on a hub.
        lora: an adapter that is added to the model.
    """

    path: str
    key: str | None = None
    revision: str | None = None
    lora: ModelReference | None = None

    def __str__(self) -> str:
        marks = (("#", self.key), ("@", self.revision), ("+", self.lora))
        return self.path + "".join(f"{mark}{text}" for mark, text in marks if text is not None)

    @property
    def model(self) -> ModelReference:
        """The model without its adapter."""
        return replace(self, lora=None)

    def same(self, other: ModelReference | None) -> bool:
        """Whether both name one model, however the path is spelled (`./base/` and `base`)."""
        return other is not None and self._identity() == other._identity()

    def locate(self, folder: Path | None = None) -> Path:
        """Finds the checkpoint, without its adapter: in the working directory, beside the recipe, else on the hub.

        A path with a scheme (gs://, s3://) is fetched. A file or folder wins over a model of that name
        on the hub.

        Args:
            folder: the recipe's own folder.

        Returns:
            An existing file or folder.

        Raises:
            FileNotFoundError: saying where was looked, and the nearest name that exists; or why it
                cannot be fetched.
        """
        if is_remote(self.path):
            return fetch(self.path)
        path = Path(self.path).expanduser()
        places = [path] if path.is_absolute() or folder is None else [path, folder / path]
        for candidate in places:
            if candidate.exists() and self.revision is None:
                return candidate
        if is_hub_name(self.path):
            return snapshot(self.path, self.revision)
        raise FileNotFoundError(self._not_found(places))

    def _not_found(self, places: list[Path]) -> str:
        looked = dict.fromkeys(str(place.absolute().parent) for place in places)
        message = f"no file or folder {self.path!r} (looked in {' and '.join(looked)})"
        for place in places:
            near = nearest_name(place)
            if near is not None:
                message += f"; did you mean {near!r}?"
                break
        if self.revision is not None:
            message += f"; {self.revision!r} would be a revision of a model on the Hugging Face hub"
        return message

    def _identity(self) -> tuple[object, ...]:
        adapter = None if self.lora is None else self.lora._identity()
        return os.path.normpath(self.path), self.key, self.revision, adapter


def parse_reference(value: object) -> ModelReference:
    """Reads a model's name, as text or as mergekit's mapping.

    Text is `path`, `path#nested.key` or `path@revision+adapter`. Text that names an existing
    file or folder as it stands is that path, whatever signs it contains.

    Args:
        value: text, or `{model: {path, revision}, lora}`.

    Raises:
        ValueError: on anything else.

    >>> parse_reference("run/last.pt#model.state_dict")
    ModelReference(path='run/last.pt', key='model.state_dict', revision=None, lora=None)
    >>> parse_reference({"model": {"path": "experts/a"}}).path
    'experts/a'
    >>> parse_reference("org/a@main+org/adapter").lora.path
    'org/adapter'
    """
    if isinstance(value, ModelReference):
        return value
    return _from_mapping(value) if isinstance(value, Mapping) else _from_text(value)


def nearest_name(path: Path) -> str | None:
    """Returns the existing name in the folder of `path` that is nearest to it, if any."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        return None
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return str(path.parent / near[0]) if near else None


def _from_text(value: object) -> ModelReference:
    if not isinstance(value, str):
        found = "nothing" if value is None else f"{value!r} ({type(value).__name__})"
        raise ValueError(f"expected a path, found {found}; quote a path that looks like a number")
    if not value.strip():
        raise ValueError("the path is empty")
    if os.path.exists(os.path.expanduser(value)):
        return ModelReference(value)
    model, *adapter = value.split("+")
    if len(adapter) > 1:
        raise ValueError(f"cannot read {value!r}: a model has at most one adapter")
    reference = _without_adapter(model, value)
    if not adapter:
        return reference
    if reference.key is not None:
        raise ValueError(f"cannot read {value!r}: an adapter needs a model with a config, no file")
    return replace(reference, lora=_without_adapter(adapter[0], value))


def _without_adapter(text: str, whole: str) -> ModelReference:
    path, *revision = text.split("@")
    path, key = split_key(path)
    if len(revision) > 1 or (key and revision):
        raise ValueError(
            f"cannot read {whole!r}: expected path, path#nested.key or path@revision+adapter"
        )
    if not path or "" in revision:
        raise ValueError(f"cannot read {whole!r}: nothing stands beside one of '#', '@', '+'")
    return ModelReference(path, key, revision[0] if revision else None)


def _from_mapping(value: Mapping[str, object]) -> ModelReference:
    unknown = [str(key) for key in value if key not in _FIELDS]
    if unknown or "model" not in value:
        found = f"unknown key {unknown[0]!r}" if unknown else "no key 'model'"
        raise ValueError(f"a model given as a mapping is {{model: {{path: ...}}}}; found {found}")
    reference = _from_path(value["model"])
    adapter = value.get("lora")
    return reference if adapter is None else replace(reference, lora=_from_path(adapter))


def _from_path(value: object) -> ModelReference:
    if not isinstance(value, Mapping):
        return _from_text(value)
    extra = [str(key) for key in value if key not in ("path", "revision")]
    if extra or not isinstance(value.get("path"), str):
        found = f"unknown key {extra[0]!r}" if extra else "no text under 'path'"
        raise ValueError(f"expected {{path: ..., revision: ...}}; found {found}")
    revision = value.get("revision")
    return ModelReference(str(value["path"]), revision=None if revision is None else str(revision))
