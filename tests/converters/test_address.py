"""Paths with keys."""

import pytest

from jaxmerge.converters import CheckpointError, split_key


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("x.pth", ("x.pth", None)),
        ("x.pth#model.state_dict", ("x.pth", "model.state_dict")),
        ("x.pth#a#b", ("x.pth", "a#b")),
        ("org/model", ("org/model", None)),
    ],
)
def test_the_key_stands_behind_the_hash(address, expected):
    assert split_key(address) == expected


def test_a_file_whose_name_has_a_hash_wins(tmp_path):
    (tmp_path / "run#3").mkdir()
    (tmp_path / "run#3" / "x#1.pth").write_bytes(b"")
    path = str(tmp_path / "run#3" / "x#1.pth")
    assert split_key(path) == (path, None)
    assert split_key(f"{path}#model") == (path, "model")


def test_an_empty_key_is_refused():
    with pytest.raises(CheckpointError, match="expected a key"):
        split_key("x.pth#")
