"""Which part of a nested structure is the state dict; no torch needed."""

import numpy as np
import pytest

from jaxmerge.converters import CheckpointError
from jaxmerge.converters.state_dict_key import select, split

T = np.ones(1)
STATE = {"fc.weight": T, "fc.bias": T}


def is_tensor(value):
    return isinstance(value, np.ndarray)


def selected(structure, key=None):
    return ".".join(select(structure, key, is_tensor, "x.pth")[1])


@pytest.mark.parametrize(
    ("structure", "key"),
    [
        (STATE, ""),
        ({**STATE, "epoch": 3, "_extra_state": {"a": T}}, ""),
        ({**STATE, "args": {"width": 3}}, ""),
        ({"state_dict": STATE, "epoch": 3}, "state_dict"),
        ({"whatever": STATE, "loss": 0.5}, "whatever"),
        (
            {"model": {"state_dict": STATE, "args": {}}, "optimizer": {"state": {}}},
            "model.state_dict",
        ),
        ({"model": STATE, "loss": T}, "model"),
        ({"model": STATE, "optim_state": {"a": T, "b": T}}, "model"),
        ({"model": STATE, "adam": {"state": {"m": T}, "param_groups": []}}, "model"),
        ({"model": {**STATE, "c": T}, "stats": {"mean": T}}, "model"),
    ],
)
def test_the_state_dict_that_stands_out_is_taken(structure, key):
    assert selected(structure) == key


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (
            {"model": STATE, "ema": STATE},
            r"more than one state dict inside; candidate keys: model \(2 tensors\), ema \(2 te",
        ),
        ({"generator": STATE, "discriminator": STATE}, r"generator \(2.*discriminator \(2"),
        ({"model": STATE, "net": STATE}, "more than one"),
        (
            {"epoch": 3, "optimizer": STATE},
            r"no state dict inside; the top level has the keys 'epo",
        ),
        ([T], "no state dict inside; the file holds a list"),
        (T, "no state dict inside; the file holds a ndarray"),
        ({}, "no state dict inside"),
        ({0: {1: T}}, "no state dict inside; the top level has the keys 0"),
    ],
)
def test_a_choice_that_would_be_a_guess_is_an_error(structure, message):
    with pytest.raises(CheckpointError, match=message):
        selected(structure)


@pytest.mark.parametrize(
    ("structure", "key"),
    [
        ({"a": {"b": STATE}}, "a.b"),
        ({"a.b": STATE, "a": {"b": {"x": 1}}}, "a.b"),
        ({"a.b": {"c": STATE}, "a": {"b.c": 3}}, "a.b.c"),
        ({"a": {"b.c": STATE}, "a.b": {"d": STATE}}, "a.b.c"),
        ({"ema": STATE, "model": STATE}, "ema"),
        ({"optimizer": STATE}, "optimizer"),
    ],
)
def test_a_key_walks_mappings_and_may_have_dots_itself(structure, key):
    state, path = select(structure, key, is_tensor, "x.pth")
    assert state is STATE
    assert ".".join(path) == key


def test_the_longest_match_of_a_key_wins():
    other = {"w": T}
    structure = {"a.b": STATE, "a": {"b": other}}
    assert select(structure, "a.b", is_tensor, "x.pth") == (STATE, ("a.b",))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("modle", r"x.pth: no key 'modle'; candidate keys: model \(2 tensors\). Nearest: 'model'"),
        ("epoch", r"key 'epoch': expected a state dict \(names to tensors\), found a int"),
        ("model.fc.weight", r"found a ndarray"),
        ("model.fc.weight.deeper", r"no key"),
        ("", r"no key ''"),
    ],
)
def test_a_wrong_key_is_an_error_that_lists_candidates(key, message):
    with pytest.raises(CheckpointError, match=message):
        selected({"model": STATE, "epoch": 3}, key)


def test_tensors_hidden_in_a_chosen_state_dict_are_an_error():
    with pytest.raises(
        CheckpointError, match=r"entry 'inner': expected a tensor, found a dict wit"
    ):
        split({**STATE, "inner": {"w": T}}, is_tensor, "x.pth")


def test_structures_that_contain_themselves_end():
    loop: dict[str, object] = {"epoch": 1}
    loop.update({f"self{i}": loop for i in range(50)})
    with pytest.raises(CheckpointError, match="no state dict"):
        selected(loop)
    assert selected({"model": STATE, "loop": loop}) == "model"
