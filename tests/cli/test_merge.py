"""`jaxmerge merge`: what it writes and says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxmerge import recipes
from jaxmerge.cli import consoles
from jaxmerge.converters import CheckpointWriter, load_checkpoint, open_checkpoint


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_merge_writes_the_checkpoint_and_says_so(folder: Path, call: Any, out: str) -> None:
    result = call("merge", "ties.yaml", out)
    assert result.exit_code == 0
    line = result.stdout.strip().splitlines()[-1]
    assert line.startswith(f"{out}: 3 tensors merged by ties, 1 carried over; 200 B in ")
    assert result.stderr == ""
    written = load_checkpoint(out)
    assert list(written) == ["fc.weight", "fc.bias", "head.weight", "steps"]
    assert written["steps"] == 2**40


@pytest.mark.torch
def test_format_writes_a_folder_for_pytorch(folder: Path, call: Any) -> None:
    pytest.importorskip("torch")
    assert call("merge", "ties.yaml", "out", "--format", "torch").exit_code == 0
    assert Path("out/pytorch_model.bin").exists()
    with open_checkpoint("out") as checkpoint:
        assert checkpoint.format == "torch"


def test_notes_go_to_stderr(folder: Path, call: Any) -> None:
    text = Path("ties.yaml").read_text() + "dtype: bfloat16\n"
    Path("ties.yaml").write_text(text)
    result = call("merge", "ties.yaml", "out")
    assert result.stderr.startswith("note: ties.yaml:7: merged in float32 arithmetic")
    assert "\x1b" not in result.output


def test_seed_decides_a_random_method(folder: Path, call: Any) -> None:
    text = Path("ties.yaml").read_text().replace("ties", "dare_ties")
    Path("dare.yaml").write_text(text)
    for out, seed in (("one", 1), ("again", 1), ("two", 2)):
        assert call("merge", "dare.yaml", out, "--seed", seed).exit_code == 0
    one, again, two = (load_checkpoint(out)["fc.weight"] for out in ("one", "again", "two"))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, two)
    assert json.loads(Path("two/jaxmerge.json").read_text())["seed"] == 2


def test_overwrite_replaces(folder: Path, call: Any) -> None:
    assert call("merge", "ties.yaml", "out").exit_code == 0
    Path("ties.yaml").write_text(Path("ties.yaml").read_text().replace("0.75", "3"))
    before = load_checkpoint("out")["fc.weight"]
    assert call("merge", "ties.yaml", "out", "--overwrite").exit_code == 0
    assert not np.array_equal(load_checkpoint("out")["fc.weight"], before)


def test_a_merge_interrupted_at_once_says_that_nothing_remains(
    folder: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "run", interrupted)
    result = call("merge", "ties.yaml", "out")
    assert result.exit_code == 130
    assert result.stderr == "error: interrupted; nothing half-written remains\n"
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            OSError(28, "No space left on device", "out/x"),
            "error: out/x: No space left on device\n",
        ),
        (MemoryError(), "error: out of memory\n"),
        (KeyError("w"), "error:\n  KeyError: 'w'\n  This should not happen."),
    ],
)
def test_failures_during_the_work_have_exit_code_1(
    folder: Path, call: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(recipes, "run", failing)
    result = call("merge", "ties.yaml", "out")
    assert result.exit_code == 1
    assert result.stderr.startswith(text)
    assert call("--debug", "merge", "ties.yaml", "out").exception is error
    monkeypatch.setenv("JAXMERGE_DEBUG", "1")
    assert call("merge", "ties.yaml", "out").exception is error


def test_a_method_of_ones_own_is_imported(folder: Path, call: Any) -> None:
    Path("mine.py").write_text(
        "import jaxmerge as jm\n"
        "from jaxmerge.methods import LeafMethod, from_leaf, names, register\n"
        "def cli_test_first() -> jm.MergeMethod:\n"
        "    first = lambda chunk, values, found: chunk.sources()[0]\n"
        "    leaf = LeafMethod('cli_test_first', first, {}, base='unused')\n"
        "    return from_leaf(leaf, summary='The first model.')\n"
        "if 'cli_test_first' not in names():\n"
        "    register(cli_test_first)\n"
    )
    Path("first.yaml").write_text(
        "dialect: jaxmerge\nmerge_method: cli_test_first\nmodels: [{model: a}, {model: b}]\n"
    )
    try:
        assert call("merge", "first.yaml", "out", "--import", "mine.py").exit_code == 0
        merged = load_checkpoint("out")["fc.weight"]
        np.testing.assert_array_equal(merged, load_checkpoint("a")["fc.weight"])
    finally:
        from jaxmerge.methods import registry

        registry._CONSTRUCTORS.pop("cli_test_first", None)


def test_a_device_that_is_not_there_is_an_error(folder: Path, call: Any) -> None:
    import jax

    before = jax.config.jax_platforms
    try:
        result = call("merge", "ties.yaml", "out", "--device", "tpu")
    finally:
        jax.config.update("jax_platforms", before)
    assert result.exit_code == 2
    assert "--device tpu: JAX finds no such device, only cpu" in result.stderr
    assert "jaxmerge[tpu]" in result.stderr


def test_colour_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert consoles._console(Terminal()).no_color is False  # type: ignore[arg-type]
    monkeypatch.setenv("NO_COLOR", "1")
    assert consoles._console(Terminal()).no_color is True  # type: ignore[arg-type]


def test_an_interrupted_merge_says_how_to_go_on(
    folder: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_flat, calls = CheckpointWriter.write_flat, 0

    def interrupted(self: CheckpointWriter, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return write_flat(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointWriter, "write_flat", interrupted)
        result = call("merge", "ties.yaml", "out")
    assert result.exit_code == 130
    message = "out is unfinished; the same command goes on where it stopped"
    assert result.stderr == f"error: interrupted; {message}\n"
    result = call("merge", "ties.yaml", "out")
    assert result.exit_code == 0
    assert result.stderr == "note: goes on with the unfinished run in out\n"
    again = call("merge", "ties.yaml", "out")
    assert again.exit_code == 0
    assert again.stdout.startswith("out: is the result of this merge already")


def test_shards_have_the_size_asked_for(folder: Path, call: Any) -> None:
    assert call("merge", "ties.yaml", "out", "--shard-size", "100B").exit_code == 0
    assert call("merge", "ties.yaml", "small", "--out-shard-size", "0.1K").exit_code == 0
    assert len(list(Path("out").glob("*.safetensors"))) == 1
    assert len(list(Path("small").glob("*.safetensors"))) == 3
    bad = call("merge", "ties.yaml", "bad", "--shard-size", "many")
    assert bad.exit_code == 2
    assert "expected a size such as 5GB or 500MB, found 'many'" in bad.stderr


def test_a_memory_limit_changes_nothing_but_must_be_enough(folder: Path, call: Any) -> None:
    assert call("merge", "ties.yaml", "out").exit_code == 0
    assert call("merge", "ties.yaml", "small", "--memory-limit", "400MiB").exit_code == 0
    for name, array in load_checkpoint("out").items():
        np.testing.assert_array_equal(load_checkpoint("small")[name], array)
    for limit, message in (("much", "expected a size"), ("10MB", "needs 335.5 MB of memory here")):
        bad = call("merge", "ties.yaml", "bad", "--memory-limit", limit)
        assert bad.exit_code == 2
        assert message in bad.stderr
    assert call("plan", "ties.yaml", "--memory-limit", "10MB").exit_code == 2
    assert not Path("bad").exists()
