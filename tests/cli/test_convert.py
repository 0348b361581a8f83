"""`jaxmerge convert`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxmerge.converters import load_checkpoint, save_checkpoint


def test_convert_says_what_it_wrote(folder: Path, call: Any) -> None:
    result = call("convert", "a", "out", "--dtype", "bfloat16", "--shard-size", "60")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("out: 4 tensors, 104 B in ")
    assert load_checkpoint("out")["fc.weight"].dtype.name == "bfloat16"
    assert len(list(Path("out").glob("*.safetensors"))) == 2


@pytest.mark.torch
def test_a_state_dict_is_named_after_the_file(folder: Path, call: Any) -> None:
    torch = pytest.importorskip("torch")
    state = {"w": torch.ones(2), "version": 3}
    torch.save({"model": state, "ema": {"w": torch.zeros(2), "version": 3}}, "m.pt")
    result = call("convert", "m.pt#ema", "m.safetensors")
    assert result.exit_code == 0, result.output
    assert "left out, as they are no tensors: version" in result.stderr
    np.testing.assert_array_equal(load_checkpoint("m.safetensors")["w"], [0, 0])


def test_overflow_is_noted(folder: Path, call: Any) -> None:
    save_checkpoint("large.safetensors", {"w": np.float32([1e9, 1])})
    result = call("convert", "large.safetensors", "small.safetensors", "--dtype", "float16")
    assert "values too large for float16, now infinite or NaN: w (1)" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "out"), "nowhere: no such file"),
        (("a", "b"), "b: the folder is not empty"),
        (("a", "out", "--shard-size", "much"), "expected a size such as 5GB"),
        (("a", "out", "--dtype", "int4"), "expected a dtype out of"),
    ],
)
def test_bad_input_is_one_message(
    folder: Path, call: Any, arguments: tuple[str, ...], message: str
) -> None:
    result = call("convert", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not Path("out").exists()
