"""What gets installed: the wheel's files, one version, and an import that stays light."""

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxmerge

ROOT = Path(__file__).parents[1]

# Heavy, optional, or of one command only: imported where they are used.
LAZY = (
    *("torch", "transformers", "matplotlib", "optax", "flax", "evosax", "orbax", "typer", "rich"),
    *("pydantic", "yaml"),
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel, built from a copy of the sources, so that nothing is left beside them."""
    pytest.importorskip("build", reason="needs the `test` extra: build")
    pytest.importorskip("setuptools", "77", reason="needs the `test` extra: setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("jaxmerge", "converters", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder]
    done = subprocess.run([*command, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_wheel_holds_every_module_where_it_is_imported_from(wheel: zipfile.ZipFile) -> None:
    expected = {str(file.relative_to(ROOT)) for file in (ROOT / "jaxmerge").rglob("*.py")}
    expected |= {f"jaxmerge/{file.relative_to(ROOT)}" for file in _converters()}
    found = {name for name in wheel.namelist() if name.endswith(".py")}
    assert found == expected
    assert "jaxmerge/converters/__init__.py" in found


def test_the_wheel_holds_data_type_marker_and_licences(wheel: zipfile.ZipFile) -> None:
    found = set(wheel.namelist())
    data = [*(ROOT / "jaxmerge/data").glob("*.npz"), *(ROOT / "jaxmerge/data").glob("*.txt")]
    assert {file.suffix for file in data} == {".npz", ".txt"}
    assert {str(file.relative_to(ROOT)) for file in data} <= found
    assert "jaxmerge/py.typed" in found
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in found)


def test_the_wheel_puts_one_package_beside_other_peoples(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"jaxmerge", f"jaxmerge-{jaxmerge.__version__}.dist-info"}


def test_the_wheel_has_the_command_and_the_version(wheel: zipfile.ZipFile) -> None:
    information = f"jaxmerge-{jaxmerge.__version__}.dist-info"
    assert "jaxmerge = jaxmerge.cli:main" in wheel.read(f"{information}/entry_points.txt").decode()
    assert f"Version: {jaxmerge.__version__}" in wheel.read(f"{information}/METADATA").decode()


def test_the_version_stands_in_one_place() -> None:
    assert jaxmerge.__version__ == importlib.metadata.version("jaxmerge")
    written = f'"{jaxmerge.__version__}"'
    files = [*(ROOT / "jaxmerge").rglob("*.py"), *_converters(), ROOT / "pyproject.toml"]
    assert [file.name for file in files if written in file.read_text(encoding="utf-8")] == [
        "_version.py"
    ]


def test_importing_the_package_imports_nothing_heavy() -> None:
    # The names are loaded at first use: use them.
    code = (
        "import sys; from jaxmerge import MergeMethod, merge, methods, tree; "
        f"print([name for name in {LAZY} if name in sys.modules])"
    )
    assert _run(code) == "[]"


def test_importing_converters_does_not_import_torch() -> None:
    code = "import sys, jaxmerge.converters; print('torch' in sys.modules)"
    assert _run(code) == "False"


def _converters() -> list[Path]:
    return sorted((ROOT / "converters").rglob("*.py"))


def _run(code: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
