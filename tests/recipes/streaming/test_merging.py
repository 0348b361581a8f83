"""A streamed merge gives what merging in memory gives, whatever is cut, kept, grouped or left for another run."""

import contextlib
import gc
import threading
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from recipes.streaming.conftest import SHAPES, Planned, save

import jaxmerge as jm
from jaxmerge.converters import CheckpointError, load_checkpoint, save_checkpoint
from jaxmerge.methods import MergeMethod, Sums
from jaxmerge.recipes import Plan, PlanError
from jaxmerge.recipes.plan import PlannedTensor
from jaxmerge.recipes.streaming import grouping, memory, merging, numbers
from jaxmerge.recipes.streaming.merging import merged
from jaxmerge.recipes.streaming.piece import Piece


def streamed(
    plan: Plan, tensors: Sequence[PlannedTensor] | None = None, **arguments: Any
) -> dict[str, np.ndarray]:
    """The tensors, put together from pieces that must follow each other."""
    wanted = plan.tensors if tensors is None else tensors
    pieces: dict[str, list[Piece]] = {}
    for piece in merged(plan, wanted, **arguments):
        mine = pieces.setdefault(piece.name, [])
        assert piece.start == sum(one.values.size for one in mine)
        assert not (mine and mine[-1].last)
        mine.append(piece)
    assert list(pieces) == [tensor.name for tensor in wanted]
    assert all(mine[-1].last for mine in pieces.values())
    return {
        tensor.name: np.concatenate([one.values for one in pieces[tensor.name]]).reshape(
            tensor.shape
        )
        for tensor in wanted
    }


def in_memory(plan: Plan, wide: bool = False) -> dict[str, np.ndarray]:
    models = [load_checkpoint(plan.sources[i].path) for i in plan.models]
    base = None if plan.base is None else load_checkpoint(plan.sources[plan.base].path)
    method = plan.merges[0].method
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        result = jm.merge(
            method, models, base=base, key=jax.random.key(3), **plan.resolved.hyperparameters
        )
    return {name: np.asarray(array) for name, array in method.params_of(result).items()}


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def adds_up(method: MergeMethod) -> bool:
    """Whether it takes sums, which round by the order of their terms."""
    assert method.leaf is not None
    return any(isinstance(one, Sums) for one in method.leaf.measures)


def nameable() -> Iterator[str]:
    """The methods that a recipe can name: those that need nothing beside the models."""
    for name in jm.methods.names():
        if not any(extra.required for extra in jm.methods.get(name)().extras.values()):
            yield name


@pytest.fixture
def compiled_in_haste() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def plan_of(planned: Planned, name: str, **arguments: Any) -> Plan:
    method = jm.methods.get(name)()
    two = method.base == "source" and method.models == (2, 2)
    models = ("a",) if method.models[1] == 1 or two else ("a", "b")
    return planned(name, models=models, **arguments)


@pytest.mark.usefixtures("cut_small", "compiled_in_haste")
@pytest.mark.parametrize("name", [*nameable()])
def test_every_method_gives_what_it_gives_in_memory(planned: Planned, name: str) -> None:
    plan = plan_of(planned, name)
    found, expected = streamed(plan), in_memory(plan)
    if not adds_up(plan.merges[0].method):
        assert_same_bits(found, expected)
        return
    for tensor, array in expected.items():
        assert found[tensor].dtype == array.dtype
        few_ulps = {2: 1e-2, 4: 1e-5, 8: 0}[array.dtype.itemsize]
        np.testing.assert_allclose(
            found[tensor].astype(np.float64),
            array.astype(np.float64),
            rtol=few_ulps,
            atol=few_ulps / 10,
            err_msg=tensor,
        )


@pytest.mark.usefixtures("cut_small")
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("linear", {"weight": [0.3, 0.9]}),
        ("ties", {"density": [0.3, 0.7], "weight": [0.6, 1.1]}),
        ("dare_ties", {"density": 0.4, "weight": [0.6, 1.1]}),
    ],
)
def test_optimised_programs_agree_bit_for_bit(
    planned: Planned, name: str, parameters: dict[str, Any]
) -> None:
    plan = planned(name, parameters)
    assert_same_bits(streamed(plan), in_memory(plan))


@pytest.mark.usefixtures("cut_small", "compiled_in_haste")
def test_shares_of_models_beyond_32_bits_are_counted(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned("ties", {"density": [0.3, 0.7]})
    expected = streamed(plan)
    monkeypatch.setattr(numbers, "LARGEST", 1000)
    assert_same_bits(streamed(plan), expected)


@pytest.mark.usefixtures("cut_small")
def test_float64_is_merged_in_float64(planned: Planned, tmp_path: Path) -> None:
    save(tmp_path, {"w": ((30, 20), np.float64), "b": ((5,), np.float64)})
    plan = planned("ties", {"density": 0.5}, options={"scope": "tensor"})
    assert_same_bits(streamed(plan), in_memory(plan, wide=True))


@pytest.mark.usefixtures("cut_small", "compiled_in_haste")
@pytest.mark.parametrize("name", ["della", "slerp", "ties", "metagpt"])
def test_neither_memory_nor_what_else_is_merged_changes_a_bit(planned: Planned, name: str) -> None:
    plan = plan_of(planned, name)
    everything = streamed(plan)
    assert_same_bits(streamed(plan, memory_limit=1), everything)
    some = plan.tensors[1::3]
    assert_same_bits(
        streamed(plan, some), {tensor.name: everything[tensor.name] for tensor in some}
    )
    backwards = plan.tensors[::-1]
    assert_same_bits(
        streamed(plan, backwards), {tensor.name: everything[tensor.name] for tensor in backwards}
    )


@pytest.mark.usefixtures("cut_small", "compiled_in_haste")
@pytest.mark.parametrize(
    ("name", "scope"), [("ties", "model"), ("ties", "tensor"), ("dare_ties", None), ("slerp", None)]
)
def test_tensors_in_one_group_keep_numbers_of_their_own(
    planned: Planned, name: str, scope: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(planned, name, options={"scope": scope} if scope else None)
    which = "t" if name == "slerp" else "weight"
    tensors = tuple(
        replace(
            tensor,
            hyperparameters={
                **tensor.hyperparameters,
                which: i / 20 if which == "t" else (i / 20, 0.7),
            },
        )
        if tensor.action == "merge"
        else tensor
        for i, tensor in enumerate(plan.tensors)
    )
    plan = replace(plan, tensors=tensors)
    grouped = streamed(plan)
    monkeypatch.setattr(grouping, "_RARE", 1000)
    for tensor, array in streamed(plan).items():
        np.testing.assert_allclose(
            grouped[tensor].astype(np.float64), array.astype(np.float64), rtol=1e-6, atol=1e-7
        )


@pytest.mark.usefixtures("cut_small", "compiled_in_haste")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_wherever_it_stands(
    planned: Planned, tmp_path: Path, bad: float
) -> None:
    save(tmp_path)
    broken = load_checkpoint(tmp_path / "b")
    broken["wide"][-1, -1] = bad
    save_checkpoint(tmp_path / "b", broken)
    with pytest.raises(CheckpointError, match="b: tensor 'wide' holds 1 value"):
        streamed(planned("linear"))


@pytest.mark.usefixtures("cut_small", "compiled_in_haste")
def test_tied_names_get_the_values_of_their_tensor(planned: Planned, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        shared = np.random.default_rng(seed).normal(size=(20, 20)).astype(np.float32)
        save_checkpoint(tmp_path / name, {"z.embed": shared, "a.head": shared})
    plan = planned("dare_linear", {"density": 0.5})
    found = streamed(plan)
    np.testing.assert_array_equal(found["z.embed"], found["a.head"])
    assert [tensor.tied_to for tensor in plan.tensors] != [None, None]


# --- programs and memory


COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: COMPILED.append(event) if "backend_compile" in event else None
)


@pytest.mark.usefixtures("cut_small", "compiled_in_haste")
def test_programs_do_not_grow_with_shapes_and_numbers(planned: Planned, tmp_path: Path) -> None:
    shapes = {f"t{i}.w": ((3 + i, 17), np.float32) for i in range(60)}
    save(tmp_path, shapes)
    plan = planned("task_arithmetic")
    COMPILED.clear()
    streamed(plan)
    # One for each of few shapes that are not cut, and cuts of 1, 2, 4, ... 256 elements.
    assert len(COMPILED) <= 16 + 9
    COMPILED.clear()
    streamed(planned("task_arithmetic", {"weight": [0.1, 0.2], "lambda": 0.3}))
    assert not COMPILED


@pytest.mark.usefixtures("compiled_in_haste")
def test_memory_does_not_grow_with_the_model(
    planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jaxmerge.recipes.streaming import cuts

    monkeypatch.setattr(cuts, "LARGEST", 1 << 12)
    shares = memory.Shares(threads=2, kept=0)
    monkeypatch.setattr(memory, "shares", lambda *_: shares)

    def peak(rows: int) -> int:
        save(tmp_path, {"w": ((rows, 1 << 10), ml_dtypes.bfloat16)})
        plan = planned("ties", {"density": 0.5}, options={"scope": "tensor"})
        for piece in merged(plan, plan.tensors[:1]):
            del piece
        gc.collect()
        tracemalloc.start()
        for piece in merged(plan, plan.tensors[:1]):
            del piece
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    small, large = peak(1 << 8), peak(1 << 10)
    # Three sources of 2 MiB are read; what is held is a few cuts and the sample.
    assert large < small + (1 << 20)
    assert large < 3 << 20


def test_a_limit_that_an_uncut_method_cannot_keep_is_refused_by_the_plan(planned: Planned) -> None:
    with pytest.raises(
        PlanError, match=r"iso_c needs 335\.\d MB of memory here, more than the limit of 1"
    ):
        planned("iso_c", memory_limit=10**8)
    assert planned("iso_c", memory_limit=10**9).memory < 10**9


def test_an_abandoned_merge_ends_its_threads(planned: Planned) -> None:
    plan = planned("linear")
    before = threading.active_count()
    pieces = merged(plan, plan.tensors)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_methods_without_a_leaf_see_all_tensors_at_once(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned("linear", {"weight": [0.25, 0.75]})
    method = plan.merges[0].method
    expected = streamed(plan)
    leafless = replace(plan, merges=(replace(plan.merges[0], method=replace(method, leaf=None)),))
    monkeypatch.setattr(merging.memory, "memory_needed", lambda *_: 1)
    assert_same_bits(streamed(leafless), expected)
    assert set(expected) == {*SHAPES, "steps", "none"}
