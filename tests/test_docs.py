"""The documentation is true: its examples run, its recipes resolve, its commands and links exist."""

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
import typer

import jaxmerge as jm
from jaxmerge.cli.app import app
from jaxmerge.converters import families
from jaxmerge.methods import registry
from jaxmerge.recipes import parse, parse_all, resolve
from jaxmerge.searching.schema import parse_search
from jaxmerge.sweeping import import_source

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MERGEKIT_PAGE = ROOT / "docs/from-mergekit.md"
METHOD_PAGE = ROOT / "docs/your-method.md"
MODELS_PAGE = ROOT / "docs/models.md"

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


class Block(NamedTuple):
    """A fenced block: its info string, its text, and the line it begins on."""

    info: str
    text: str
    line: int


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page registers is gone after the test."""
    monkeypatch.setattr(registry, "_CONSTRUCTORS", dict(registry._CONSTRUCTORS))
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))


@every_page
def test_python_examples_run_in_order_and_print_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block `text` right after a block `python` is what that one prints."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "example"}
    found = list(blocks(page))
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block.info != "python":
            continue
        # Blank lines before the code give tracebacks the page's own line numbers.
        code = compile("\n" * block.line + block.text, str(page), "exec")
        # Users' functions run under JAX's own settings.
        with (
            contextlib.redirect_stdout(io.StringIO()) as printed,
            jax.numpy_rank_promotion("allow"),
        ):
            exec(code, names)
        if after is not None and after.info == "text":
            assert printed.getvalue() == after.text, f"{page.name}:{after.line}"


@every_page
def test_recipes_resolve(page: Path) -> None:
    for block in blocks(page):
        if block.info == "yaml" and "merge_method" in block.text and not _needs_import(block):
            for recipe in parse_all(block.text, filename=f"{page.name}:{block.line}"):
                resolve(recipe)


@every_page
def test_searches_are_read(page: Path) -> None:
    for block in blocks(page):
        if block.info == "yaml" and "methods:" in block.text:
            parse_search(block.text, filename=f"{page.name}:{block.line}")


@every_page
def test_commands_and_their_options_exist(page: Path) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    known = {
        name: {option for one in command.params for option in one.opts}
        for name, command in commands.items()
    }
    for words in command_lines(page):
        if words[0].startswith("-"):
            continue
        assert words[0] in known, f"{page.name}: jaxmerge {words[0]}"
        options = {word.split("=")[0] for word in words if word.startswith("--")}
        assert options <= known[words[0]] | {"--help"}, f"{page.name}: jaxmerge {' '.join(words)}"


@every_page
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (?:\w+=\S+ )*([\w-]+)", shell(page), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"


@every_page
def test_links_lead_to_files_of_the_repository(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith(("https:", "http:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_table_of_methods_gives_the_defaults_of_the_registered_ones() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` .*\|(.*)\|$", text.split("<!-- methods -->")[1], re.MULTILINE)
    assert {name for name, _ in rows} == registry_names_of_the_library()
    for name, cell in rows:
        specs = jm.methods.get(name)().hyperparams
        expected = {key: spec.default for key, spec in specs.items()}
        assert {key: float(v) for key, v in re.findall(r"(\w+) \(([^)]+)\)", cell)} == expected


def test_the_page_on_choosing_speaks_of_every_method() -> None:
    table = (ROOT / "docs/how-to-choose.md").read_text(encoding="utf-8").split("\n|")
    named = {name for row in table for name in re.findall(r"`(\w+)`", row.partition("|")[0])}
    assert registry_names_of_the_library() <= named


def test_the_table_of_families_has_them_all_with_their_modules() -> None:
    table = MODELS_PAGE.read_text(encoding="utf-8").split("<!-- families -->")[1]
    rows = [
        [re.findall(r"`(\w+)`", cell) for cell in row.split("|")[1:3]]
        for row in table.splitlines()
        if row.startswith("| `")
    ]
    assert sorted(name for names, _ in rows for name in names) == sorted(families.names())
    for names, modules in rows:
        built = {families.get(name).config_type.__name__.removesuffix("Config") for name in names}
        named = {name.removesuffix("Net") for name in modules}
        assert built <= {*modules, *named}, names


def test_the_page_on_methods_gives_a_file_that_a_recipe_can_import(tmp_path: Path) -> None:
    page = list(blocks(METHOD_PAGE))
    (tmp_path / "my_methods.py").write_text(page[0].text, encoding="utf-8")
    import_source(str(tmp_path / "my_methods.py"))
    (recipe,) = [block for block in page if _needs_import(block)]
    assert resolve(parse(recipe.text)).method.name not in registry_names_of_the_library()


def registry_names_of_the_library() -> set[str]:
    """The methods whose constructors stand in the library."""
    return {
        name
        for name, constructor in registry._CONSTRUCTORS.items()
        if constructor.__module__.startswith("jaxmerge.")
    }


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    info, begun, lines = "", 0, list[str]()
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.startswith("```"):
            lines.append(line + "\n")
        elif begun:
            yield Block(info, "".join(lines), begun)
            begun = 0
        else:
            info, begun, lines = line.removeprefix("```").strip(), number, []
    assert not begun, f"{page.name}: a block is not closed"


def shell(page: Path) -> str:
    """All shell lines of a page, continued ones joined."""
    text = "".join(block.text for block in blocks(page) if block.info == "sh")
    return text.replace("\\\n", " ")


def command_lines(page: Path) -> list[list[str]]:
    """The words after `jaxmerge` of every command of a page, in blocks and in running text."""
    text = page.read_text(encoding="utf-8")
    written = [line for line in shell(page).splitlines() if line.startswith("jaxmerge ")]
    written += re.findall(r"`(jaxmerge [^`]+)`", text)
    return [shlex.split(line, comments=True)[1:] for line in written]


def _needs_import(block: Block) -> bool:
    return block.info == "yaml" and "--import" in block.text
