"""`jaxmerge methods`."""

import json
from typing import Any

from jaxmerge import methods


def test_every_registered_method_has_a_row(call: Any) -> None:
    result = call("methods")
    assert result.exit_code == 0
    first = [line.split()[0] for line in result.stdout.splitlines() if line]
    assert set(methods.names()) <= set(first)
    assert "density*=0.2 [0, 1]" in result.stdout


def test_one_method_shows_documentation_hyperparameters_and_options(call: Any) -> None:
    text = call("methods", "ties").stdout
    assert "Yadav et al." in text
    words = [line.split() for line in text.splitlines()]
    assert ["scale", "1", "lambda:", "1", "any", "shared"] in [line[:6] for line in words]
    assert ["scope", "model", "model,", "tensor"] in words


def test_json_holds_every_hyperparameter(call: Any) -> None:
    listed = {one["name"]: one for one in json.loads(call("methods", "--json").stdout)}
    assert set(listed) == set(methods.names())
    for name, one in listed.items():
        assert set(one["hyperparameters"]) == set(methods.get(name)().hyperparams)
    assert json.loads(call("methods", "slerp", "--json").stdout) == listed["slerp"]


def test_an_unknown_method_gets_the_nearest_name(call: Any) -> None:
    result = call("methods", "tise")
    assert result.exit_code == 2
    assert "unknown merge method 'tise'; did you mean 'ties'?" in result.stderr
