"""Bad input: one clear message, exit code 2, nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxmerge.converters import load_checkpoint, save_checkpoint


def rewrite(name: str, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    content = load_checkpoint(name)
    change(content)
    shutil.rmtree(name)
    save_checkpoint(name, content)


def recipe(old: str, new: str) -> Callable[[], None]:
    def change() -> None:
        text = Path("ties.yaml").read_text()
        assert old in text
        Path("ties.yaml").write_text(text.replace(old, new))

    return change


def tensor(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[], None]:
    return lambda: rewrite("b", change)


def spoil(value: float) -> Callable[[], None]:
    def change(content: dict[str, np.ndarray]) -> None:
        content["head.weight"][1, 2] = value

    return tensor(change)


def truncate() -> None:
    file = Path("b/model.safetensors")
    file.write_bytes(file.read_bytes()[:-40])


def corrupt() -> None:
    Path("b/model.safetensors").write_bytes(b"\xff" * 64)


def index_outside() -> None:
    Path("b/model.safetensors").rename("outside.safetensors")
    weight_map = dict.fromkeys(("fc.weight", "fc.bias"), "../outside.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    Path("b/model.safetensors.index.json").write_text(json.dumps(index))


def quantise() -> None:
    def change(content: dict[str, np.ndarray]) -> None:
        content["fc.qweight"] = np.zeros((2, 4), np.int32)
        content["fc.qzeros"] = np.zeros((1, 1), np.int32)
        content["fc.scales"] = np.zeros((1, 4), np.float16)

    for name in ("base", "a", "b"):
        rewrite(name, change)


def occupy() -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("keep")


MODELS = (
    "models:\n- {model: a, parameters: {weight: 0.5}}\n- {model: b, parameters: {weight: 0.75}}\n"
)

CASES: dict[str, tuple[Callable[[], object], str]] = {
    "missing tensor": (
        tensor(lambda c: c.pop("fc.bias")),
        "b: tensor 'fc.bias' is missing (base has float32[6])",
    ),
    "extra tensor": (
        tensor(lambda c: c.update({"fc.extra": c["fc.bias"]})),
        "b: extra tensor 'fc.extra' (float32[6]), which base does not have",
    ),
    "shape": (
        tensor(lambda c: c.update({"fc.bias": np.zeros(7, np.float32)})),
        "b: tensor 'fc.bias' has shape [7], expected [6] as in base",
    ),
    "dtype": (
        tensor(lambda c: c.update({"fc.bias": np.zeros(6, np.int32)})),
        "b: tensor 'fc.bias' is int32, expected a kind of float as in base (float32)",
    ),
    "unknown method": (
        recipe("ties", "tise"),
        "ties.yaml:1: unknown method 'tise'; did you mean 'ties'?",
    ),
    "unknown key": (
        recipe("base_model", "base_modle"),
        "ties.yaml:2: unknown key 'base_modle'; did you mean 'base_model'?",
    ),
    "unknown parameter": (
        recipe("density", "densty"),
        "ties.yaml:6: ties has no parameter 'densty'; did you mean 'density'?",
    ),
    "weights of the wrong length": (
        recipe(
            "parameters: {density: 0.5}",
            "parameters: {density: [0.5, 0.5, 0.5]}\ndialect: jaxmerge",
        ),
        "ties.yaml:6: 'density' lists 3 values for 2 models",
    ),
    "out of bounds": (
        recipe("density: 0.5", "density: 1.5"),
        "ties.yaml:6: 'density' must lie in [0, 1], found 1.5",
    ),
    "NaN": (spoil(np.nan), "b: tensor 'head.weight' holds 1 value(s) that are NaN or infinite"),
    "infinity": (
        spoil(-np.inf),
        "b: tensor 'head.weight' holds 1 value(s) that are NaN or infinite",
    ),
    "truncated": (truncate, "b/model.safetensors"),
    "corrupt": (corrupt, "b/model.safetensors"),
    "index outside": (index_outside, "../outside.safetensors"),
    "quantised": (quantise, "fc.qweight"),
    "empty model list": (recipe(MODELS, "models: []\n"), "`models`: the list is empty"),
    "base missing": (recipe("base_model: base\n", ""), "ties.yaml:1: ties needs `base_model`"),
    "output not empty": (occupy, "out: the output folder is not empty (mine.txt)"),
    "missing checkpoint": (recipe("model: b", "model: bb"), "no file or folder 'bb'"),
    "missing recipe": (lambda: Path("ties.yaml").rename("tie.yaml"), "ties.yaml: no such file"),
    "not YAML": (recipe("base_model: base", "base_model: ["), "ties.yaml:4: not valid YAML"),
    "no mapping": (lambda: Path("ties.yaml").write_text("- 1\n"), "a recipe is a mapping"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_bad_input_is_told_and_leaves_nothing(folder: Path, call: Any, case: str, out: str) -> None:
    prepare, message = CASES[case]
    if case == "output not empty" and out != "out":
        Path(out).write_bytes(b"keep")
        prepare, message = (lambda: None), "out.safetensors: the output file exists"
    prepare()
    before = sorted(folder.rglob("*"))
    result = call("merge", "ties.yaml", out)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.startswith("error:")
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert sorted(folder.rglob("*")) == before


def test_a_source_is_never_overwritten(folder: Path, call: Any) -> None:
    before = Path("a/model.safetensors").read_bytes()
    for out in ("a", "."):
        result = call("merge", "ties.yaml", out, "--overwrite")
        assert result.exit_code == 2
        assert f"{out}: the output would overwrite the source" in result.stderr
    assert Path("a/model.safetensors").read_bytes() == before


def test_all_problems_are_told_at_once(folder: Path, call: Any) -> None:
    recipe("density: 0.5", "density: 2, wieght: 1")()
    recipe("weight: 0.75", "scale: 1")()
    result = call("merge", "ties.yaml", "out")
    assert [line[:14] for line in result.stderr.splitlines()] == [
        "error:",
        "  ties.yaml:5:",
        "  ties.yaml:6:",
    ]


def test_commands_share_the_errors(folder: Path, call: Any) -> None:
    recipe("ties", "tise")()
    for arguments in (("plan", "ties.yaml"), ("sweep", "ties.yaml", "--grid", "density=1")):
        result = call(*arguments)
        assert result.exit_code == 2
        assert "unknown method 'tise'; did you mean 'ties'?" in result.stderr


def test_usage_is_bad_input(call: Any) -> None:
    for arguments in (("merge",), ("merg", "a", "b"), ("merge", "a", "b", "--sed", "1")):
        result = call(*arguments)
        assert result.exit_code == 2
        assert "Error" in result.stderr
