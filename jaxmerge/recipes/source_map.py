"""YAML text to plain Python data, with the line of every key and item."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from jaxmerge.recipes.errors import RecipeError

Path = tuple[str | int, ...]

_MAX_CHARACTERS = 1_000_000
_MAX_NODES = 100_000
_MAX_DEPTH = 60
_TAG = "tag:yaml.org,2002:"
_SCALARS = {_TAG + name for name in ("null", "bool", "int", "float", "str")}


@dataclass(frozen=True)
class SourceMap:
    """Where each part of a recipe stands.

    Attributes:
        filename: the recipe's name as shown in errors.
        lines: from the path of a key or item, `("models", 1, "parameters")`, to its line, from 1.
    """

    filename: str
    lines: dict[Path, int]

    def line(self, path: Path) -> int | None:
        """Returns the line of `path`, or of the nearest part that encloses it."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return None


def load(text: str, *, filename: str = "<recipe>") -> tuple[object, SourceMap]:
    """Reads one YAML document safely.

    No tags beyond YAML's own scalars, lists and mappings; a key given twice is an error; aliases
    and merge keys (`<<`) are followed, but the whole may not grow beyond 100,000 values, so that
    a small file cannot fill the memory.

    Args:
        text: the document.
        filename: its name in errors.

    Returns:
        The data (dicts, lists, str, int, float, bool, None) and the lines of its parts.

    Raises:
        RecipeError: at the line of whatever is wrong; where a second document starts, too.

    >>> data, source = load("models:\\n- model: a\\n")
    >>> data, source.line(("models", 0, "model"))
    ({'models': [{'model': 'a'}]}, 2)
    """
    documents = load_all(text, filename=filename)
    if len(documents) > 1:
        raise RecipeError(
            "a second document starts here, where one recipe is expected",
            filename=filename,
            line=documents[1][1].line(()),
        )
    return documents[0]


def load_all(text: str, *, filename: str = "<recipe>") -> list[tuple[object, SourceMap]]:
    """Reads every YAML document of a text, each as `load` reads one.

    >>> [data for data, _ in load_all("a: 1\\n---\\nb: 2\\n")]
    [{'a': 1}, {'b': 2}]
    """
    if len(text) > _MAX_CHARACTERS:
        raise RecipeError(
            f"{len(text)} characters: a recipe has at most {_MAX_CHARACTERS}", filename=filename
        )
    count = 0
    documents: list[tuple[object, SourceMap]] = []
    for node in _compose(text, filename):
        builder = _Builder(filename, count)
        documents.append((builder.build(node, (), ()), SourceMap(filename, builder.lines)))
        count = builder.count
    return documents


def _compose(text: str, filename: str) -> list[yaml.Node]:
    nodes: list[yaml.Node] = []
    try:
        loader = yaml.SafeLoader(text)
        try:
            while loader.check_node():
                node = loader.get_node()
                assert node is not None
                nodes.append(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = " ".join(part for part in (error.context, error.problem) if part)
        line = mark.line + 1 if mark else None
        raise RecipeError(f"not valid YAML: {message}", filename=filename, line=line) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"not valid YAML: character {error.character!r} is not allowed"
        raise RecipeError(message, filename=filename, line=line) from None
    except RecursionError:
        raise RecipeError("nested too deeply", filename=filename) from None
    # `---` before the first document or after the last one leaves an empty one.
    nodes = [node for node in nodes if node.tag != _TAG + "null"]
    if not nodes:
        raise RecipeError("the recipe is empty", filename=filename)
    return nodes


class _Builder:
    def __init__(self, filename: str, count: int = 0) -> None:
        self.filename = filename
        self.lines: dict[Path, int] = {}
        self.count = count
        self._construct = yaml.constructor.SafeConstructor()

    def build(self, node: yaml.Node, path: Path, above: tuple[int, ...]) -> object:
        self.count += 1
        if self.count > _MAX_NODES:
            raise self._error(node, f"more than {_MAX_NODES} values once aliases are followed")
        if id(node) in above:
            raise self._error(node, "an alias contains itself")
        if len(above) > _MAX_DEPTH:
            raise self._error(node, "nested too deeply")
        above = (*above, id(node))
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path, above)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.build(item, (*path, i), above) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        raise self._error(node, f"tag {_short(node.tag)} is not allowed in a recipe")

    def _mapping(self, node: yaml.MappingNode, path: Path, above: tuple[int, ...]) -> object:
        result: dict[str, object] = {}
        for key, name, value in self._pairs(node):
            if name in result:
                first = self.lines[(*path, name)]
                raise self._error(key, f"key {name!r} is given twice (first on line {first})")
            self.lines[(*path, name)] = key.start_mark.line + 1
            result[name] = self.build(value, (*path, name), above)
        for key, _, value in self._pairs(node, merge=True):
            for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(part, yaml.MappingNode):
                    raise self._error(key, "`<<` takes a mapping or a list of mappings")
                # Lines of merged keys are those of the anchor, where the user wrote them.
                merged = self.build(part, (*path, "<<", len(self.lines)), above)
                self._merge(result, merged, part, path)
        return result

    def _merge(
        self, result: dict[str, object], merged: object, part: yaml.MappingNode, path: Path
    ) -> None:
        assert isinstance(merged, dict)
        lines = {name: key.start_mark.line + 1 for key, name, _ in self._pairs(part)}
        for name, value in merged.items():
            if name not in result:
                result[name] = value
                self.lines[(*path, name)] = lines.get(name, part.start_mark.line + 1)

    def _pairs(
        self, node: yaml.MappingNode, *, merge: bool = False
    ) -> Iterator[tuple[yaml.Node, str, yaml.Node]]:
        for key, value in node.value:
            if (key.tag == _TAG + "merge") != merge:
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise self._error(key, "a key must be plain text")
            yield key, key.value, value

    def _scalar(self, node: yaml.ScalarNode) -> object:
        if node.tag in (_TAG + "timestamp", _TAG + "value"):
            return node.value
        if node.tag not in _SCALARS:
            raise self._error(node, f"tag {_short(node.tag)} is not allowed in a recipe")
        try:
            return self._construct.construct_object(node)
        except (ValueError, yaml.YAMLError):
            raise self._error(node, f"cannot read {node.value!r}") from None

    def _error(self, node: yaml.Node, message: str) -> RecipeError:
        return RecipeError(message, filename=self.filename, line=node.start_mark.line + 1)


def _short(tag: str) -> str:
    return f"!!{tag.removeprefix(_TAG)}" if tag.startswith(_TAG) else tag
