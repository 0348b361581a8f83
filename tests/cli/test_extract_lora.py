"""`jaxmerge extract-lora`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxmerge.converters import load_checkpoint, lora


def test_extract_lora_writes_an_adapter_and_says_what_it_holds(folder: Path, call: Any) -> None:
    result = call("extract-lora", "a", "base", "out", "--rank", 4)
    assert result.exit_code == 0, result.output
    assert "changed, and not in the adapter (--whole): fc.bias, head.weight" in result.stderr
    assert "out: 1 matrices of rank 4; " in result.stdout
    base, tuned = load_checkpoint("base"), load_checkpoint("a")
    found = lora.apply_lora(base, lora.load_lora("out"))
    np.testing.assert_allclose(found["fc.weight"], tuned["fc.weight"], atol=1e-5)
    result = call("extract-lora", "a", "base", "whole", "--energy", 0.5, "--whole")
    assert "2 tensors whole" in result.stdout
    assert not result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "base", "out"), "give --rank, or --energy, or both"),
        (("a", "base", "out", "--energy", 2), r"an energy in (0, 1], found 2"),
        (("a", "base", "b", "--rank", 1), "b: exists already and is not empty"),
        (("a", "a", "out", "--rank", 1), "nothing to extract: equal to the base"),
        (("a", "base", "out", "--rank", 1, "--dtype", "int8"), "a floating-point dtype"),
    ],
)
def test_bad_input_is_one_message(folder: Path, call: Any, arguments: Any, message: str) -> None:
    result = call("extract-lora", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not Path("out").exists()
