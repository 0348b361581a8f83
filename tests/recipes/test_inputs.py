"""Inputs of a merge: any range reads the same as the whole, rows mapped and adapters added."""

import types

import numpy as np
import pytest

from jaxmerge.converters import CheckpointError, open_checkpoint, save_checkpoint
from jaxmerge.converters.peft_adapter import LowRankUpdate
from jaxmerge.recipes import inputs
from jaxmerge.recipes.adapters import AdapterTerm
from jaxmerge.recipes.inputs import RowMap, read, read_whole
from jaxmerge.recipes.plan import PlannedInput

A, B, LORA = 0, 1, 2


@pytest.fixture
def sources(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        A: {"table": rng.standard_normal((7, 3)), "bias": rng.standard_normal(7)},
        B: {"table": rng.standard_normal((5, 3)), "bias": rng.standard_normal(5)},
        LORA: {"a": rng.standard_normal((2, 3)), "b": rng.standard_normal((7, 2))},
    }
    tensors[LORA]["m"] = rng.uniform(1, 2, 7)
    tensors[B]["bad"] = np.array([1.0, np.nan, np.inf])
    checkpoints = {}
    for index, given in tensors.items():
        tensors[index] = {name: value.astype(np.float32) for name, value in given.items()}
        save_checkpoint(tmp_path / f"{index}.safetensors", tensors[index])
        checkpoints[index] = open_checkpoint(tmp_path / f"{index}.safetensors")
    yield tensors, checkpoints
    for checkpoint in checkpoints.values():
        checkpoint.close()


def plan(*row_maps):
    named = tuple(types.SimpleNamespace(name=name) for name in ("a", "b", "lora"))
    return types.SimpleNamespace(sources=named, row_maps=row_maps, orders={})


def term(**changes):
    fields = {"target": "table", "a": "a", "b": "b", "rank": 2, "scale": 0.5, "shape": (7, 3)}
    fields |= {"transposed": False, "magnitude": None, **changes}
    return AdapterTerm(LORA, LowRankUpdate(**fields))


def table(source, count, name="table", **changes):
    shape = (count, 3) if name == "table" else (count,)
    return PlannedInput(source, name, shape, "float32", **changes)


def check_ranges(checkpoints, planned, wanted, expected):
    np.testing.assert_allclose(read_whole(checkpoints, planned, wanted), expected, rtol=1e-6)
    whole = read(checkpoints, planned, wanted)
    assert whole.dtype == wanted.dtype
    for start in range(whole.size + 1):
        for stop in (start, start + 1, start + 4, whole.size):
            if start <= stop <= whole.size:
                part = read(checkpoints, planned, wanted, start, stop)
                np.testing.assert_allclose(part, whole[start:stop], rtol=1e-6)


def test_a_plain_tensor(sources):
    tensors, checkpoints = sources
    check_ranges(checkpoints, plan(), table(A, 7), tensors[A]["table"])


def test_adapters_are_added_in_their_order(sources):
    tensors, checkpoints = sources
    a, b, m = (tensors[LORA][name].astype(np.float64) for name in ("a", "b", "m"))
    added = tensors[A]["table"] + 0.5 * (b @ a)
    check_ranges(checkpoints, plan(), table(A, 7, adapters=(term(),)), added)
    dora = added * (m / np.linalg.norm(added, axis=1))[:, None]
    check_ranges(checkpoints, plan(), table(A, 7, adapters=(term(magnitude="m"),)), dora)
    twice = dora + 0.5 * (b @ a)
    both = (term(magnitude="m"), term())
    check_ranges(checkpoints, plan(), table(A, 7, adapters=both), twice)


@pytest.mark.parametrize("name", ["table", "bias"])
@pytest.mark.parametrize("block", [1, 40, 1 << 20])
def test_rows_are_put_together_from_several_tables(sources, monkeypatch, name, block):
    monkeypatch.setattr(inputs, "_BLOCK", block)
    monkeypatch.setattr(inputs, "_GAP", block)
    tensors, checkpoints = sources
    one, two = tensors[A][name].astype(np.float64), tensors[B][name].astype(np.float64)
    rows = RowMap(
        tables=(table(A, 7, name), table(B, 5, name)),
        table=np.array([1, 0, -1, 0, 1, -1], np.int32),
        row=np.array([4, 6, -1, 0, 4, -1], np.int32),
        averages={5: ((0, 1), (1, 2), (1, 3))},
        padding=2,
    )
    mean = (one[1] + two[2] + two[3]) / 3
    expected = [two[4], one[6], np.zeros_like(mean), one[0], two[4], mean]
    expected += [np.mean(expected, axis=0)] * 2
    check_ranges(checkpoints, plan(rows), table(A, 8, name, rows=0), np.stack(expected))


def test_a_mapped_table_has_its_adapters(sources):
    tensors, checkpoints = sources
    adapted = table(A, 7, adapters=(term(),))
    rows = RowMap((adapted,), np.zeros(3, np.int32), np.array([6, 0, 3], np.int32))
    expected = (tensors[A]["table"] + 0.5 * (tensors[LORA]["b"] @ tensors[LORA]["a"]))[[6, 0, 3]]
    check_ranges(checkpoints, plan(rows), table(A, 3, rows=0), expected)


def test_values_that_are_no_numbers_are_refused_where_they_are_read(sources):
    _, checkpoints = sources
    bad = PlannedInput(B, "bad", (3,), "float32")
    assert read(checkpoints, plan(), bad, 0, 1) == [1.0]
    with pytest.raises(CheckpointError, match=r"b: tensor 'bad' holds 2 value\(s\) that are NaN"):
        read_whole(checkpoints, plan(), bad)
