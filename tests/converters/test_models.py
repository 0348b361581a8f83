"""Loading and saving models: what is recognised, what is refused, and what comes back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from parity import random_checkpoint

import jaxmerge as jm
from jaxmerge.converters import (
    CheckpointError,
    ModelConfig,
    families,
    load_checkpoint,
    load_model,
    open_checkpoint,
    save_checkpoint,
    save_model,
)
from jaxmerge.converters.families import FAMILIES
from jaxmerge.converters.families.family import Family, batch_counters
from jaxmerge.converters.families.rules import Rule, as_is
from jaxmerge.models import MLP, MLPConfig, VGGConfig

MODEL = MLPConfig((4, 5, 3))


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    return dict(random_checkpoint("mlp_fc", MODEL))


def saved(folder: Path, tensors: dict[str, Any], **config: Any) -> Path:
    path = folder / "model"
    save_checkpoint(path, tensors)
    if config:
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def test_config_json_names_the_family(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    path = saved(tmp_path, tensors, model_type="mlp_fc", features=[4, 5, 3], activation="tanh")
    _, _, config = load_model(path)
    assert config.model == MLPConfig((4, 5, 3), "tanh")


def test_the_function_is_one_object_for_equal_configs(
    tmp_path: Path, tensors: dict[str, np.ndarray]
) -> None:
    path = saved(tmp_path, tensors)
    first, params, config = load_model(path)
    second, _, again = load_model(path)
    assert first is second
    assert hash(config) == hash(again)
    assert config == again
    other, *_ = load_model(path, config=MLPConfig((4, 5, 3), "gelu"))
    assert other is not first
    np.testing.assert_array_equal(
        first(params, np.ones((1, 4))), MLP(MODEL).apply(params, np.ones((1, 4)))
    )


def test_leaves_keep_their_dtype_and_can_be_cast(
    tmp_path: Path, tensors: dict[str, np.ndarray]
) -> None:
    tensors["fc1.weight"] = tensors["fc1.weight"].astype(ml_dtypes.bfloat16)
    path = saved(tmp_path, tensors)
    _, params, config = load_model(path)
    assert params["params"]["dense_0"]["kernel"].dtype == "bfloat16"
    assert params["params"]["dense_1"]["kernel"].dtype == "float32"
    _, cast, _ = load_model(path, dtype="float16")
    assert {leaf.dtype for leaf in jax.tree.leaves(cast)} == {np.dtype("float16")}
    save_model(tmp_path / "half", params, config, dtype="bfloat16")
    assert {t.dtype.name for t in load_checkpoint(tmp_path / "half").values()} == {"bfloat16"}


def test_what_jax_would_round_is_refused(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    tensors["fc2.bias"] = tensors["fc2.bias"].astype(np.float64)
    path = saved(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"'fc2.bias' is float64.*jax_enable_x64"):
        load_model(path)
    assert load_model(path, dtype="float32")[1]["params"]["dense_1"]["bias"].dtype == "float32"


def test_wrappers_before_every_name_come_back(
    tmp_path: Path, tensors: dict[str, np.ndarray]
) -> None:
    wrapped = {f"module.net.{name}": tensor for name, tensor in tensors.items()}
    _, params, config = load_model(saved(tmp_path, wrapped))
    assert config.prefix == "module.net."
    assert config.layout["params/dense_0/kernel"].names == ("module.net.fc1.weight",)
    save_model(tmp_path / "out.safetensors", params, config)
    assert set(load_checkpoint(tmp_path / "out.safetensors")) == set(wrapped)


def test_a_merge_with_the_layout_is_the_merge_of_the_checkpoints(tmp_path: Path) -> None:
    flat = [dict(random_checkpoint("mlp_fc", MODEL, seed)) for seed in range(3)]
    trees = []
    for i, one in enumerate(flat):
        save_checkpoint(tmp_path / f"{i}.safetensors", one)
        _, params, config = load_model(tmp_path / f"{i}.safetensors")
        trees.append(params)
    options = {"key": jax.random.key(0), "density": 0.5}
    of_tree = jm.merge("dare_ties", trees[1:], base=trees[0], layout=config.layout, **options)
    of_files = jm.merge("dare_ties", flat[1:], base=flat[0], **options)
    save_model(tmp_path / "merged.safetensors", of_tree, config)
    written = load_checkpoint(tmp_path / "merged.safetensors")
    for name, tensor in of_files.items():
        np.testing.assert_array_equal(written[name], tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc2.bias": None}, "missing 'fc2.bias'"),
        (
            {"fc2.bias": None, "fc2.bais": np.zeros(3, "f4")},
            "missing 'fc2.bias'. Nearest: 'fc2.bais'",
        ),
        ({"head": np.zeros(3, "f4")}, "unexpected 'head'"),
        (
            {"fc1.bias": np.zeros(6, "f4")},
            r"shapes that do not fit the config: 'fc1.bias' expected \[5\], found \[6\]",
        ),
        (
            {"fc1.weight": np.zeros(5, "f4")},
            r"tensor .fc1.weight.: expected 2 dimensions, found shape \[5\]",
        ),
        ({"fc1.weight": None}, "no tensor 'fc1.weight'"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(
    tmp_path: Path, tensors: dict[str, np.ndarray], change: dict[str, Any], message: str
) -> None:
    changed = {name: t for name, t in (tensors | change).items() if t is not None}
    with pytest.raises(CheckpointError, match=f"model: not of family mlp_fc: {message}"):
        load_model(saved(tmp_path, changed), family="mlp_fc")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "resnet_cifar", "blocks": [1, 10**12], "widths": [8, 8]},
        {"model_type": "llama", "num_hidden_layers": 10**12, "hidden_size": 8},
        {"model_type": "clip", "vision_config": {"num_hidden_layers": 10**12}},
    ],
    ids=lambda config: config["model_type"],
)
def test_a_config_of_more_layers_than_tensors_is_refused_before_it_is_built(
    tmp_path: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]
) -> None:
    with pytest.raises(
        CheckpointError, match=r"(blocks|layers) = .*10{12}.*the checkpoint 4 tensors"
    ):
        load_model(saved(tmp_path, tensors, **config))


def test_what_no_family_has_lists_why(tmp_path: Path) -> None:
    path = saved(tmp_path, {"w": np.zeros(3, "f4")})
    with pytest.raises(
        CheckpointError, match=r"fits no family:(?s:.*)\n  mlp_fc: no tensor 'fc1.weight'"
    ):
        load_model(path)


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({"family": "mlp_cf"}, {}, "no family 'mlp_cf'. Nearest: 'mlp_fc'"),
        ({"family": "mlp_layers"}, {}, "not of family mlp_layers: no tensor 'layers.0.weight'"),
        ({"config": MLPConfig((4, 9, 3))}, {}, r"'fc1.weight' expected \[9, 4\], found \[5, 4\]"),
        ({"config": 3}, {}, "expected a config or a mapping, found 3"),
        (
            {},
            {"model_type": "mpl_fc"},
            "model_type 'mpl_fc', which no family reads. Nearest: 'mlp_fc'",
        ),
        ({}, {"model_type": "mlp_fc", "width": 3}, "MLPConfig has no field 'width'"),
        ({}, {"model_type": "mlp_fc", "activation": "rleu"}, "no such model: unknown 'rleu'"),
        (
            {},
            {"model_type": "mlp_fc", "features": 3},
            "MLPConfig: features: Input should be a valid tuple",
        ),
    ],
)
def test_families_and_configs_that_do_not_fit_say_so(
    tmp_path: Path,
    tensors: dict[str, np.ndarray],
    options: dict[str, Any],
    config: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(saved(tmp_path, tensors, **config), **options)


@pytest.mark.parametrize("text", ["[1]", "{", "\xff"])
def test_a_broken_config_json_is_named(
    tmp_path: Path, tensors: dict[str, np.ndarray], text: str
) -> None:
    path = saved(tmp_path, tensors)
    (path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json: (not valid JSON|expected an object)"):
        load_model(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["params"].pop("dense_0"), "missing 'params/dense_0/kernel', "),
        (lambda p: p.update(extra=np.zeros(3)), "unexpected 'extra'"),
        (
            lambda p: p["params"]["dense_1"].update(bias=np.zeros(4)),
            r"'params/dense_1/bias' expected \[3\], found \[4\]",
        ),
    ],
)
def test_parameters_that_do_not_fit_are_not_written(
    tmp_path: Path, change: Any, message: str
) -> None:
    params = MLP(MODEL).init(jax.random.key(0, impl="rbg"), np.ones((1, 4)))
    change(params)
    with pytest.raises(CheckpointError, match=f"not the parameters of mlp_fc.*{message}"):
        save_model(tmp_path / "out", params, ModelConfig("mlp_fc", MODEL))
    assert not (tmp_path / "out").exists()


def test_a_description_of_a_model_that_cannot_be_is_refused() -> None:
    with pytest.raises(
        CheckpointError, match="'mlp_fc' has a MLPConfig as config, found VGGConfig"
    ):
        ModelConfig("mlp_fc", VGGConfig(((4,),)))
    with pytest.raises(CheckpointError, match=r"no family 'mlp_cf'. Nearest: 'mlp_fc'"):
        ModelConfig("mlp_cf", MODEL)
    with pytest.raises(CheckpointError, match=r"family vgg: no such model: norm 'bach' is none of"):
        ModelConfig("vgg", VGGConfig(((4,),), norm="bach"))


class Tied(nn.Module):
    """A table that is also the head, and a normalisation with running statistics."""

    config: MLPConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        table = nn.Embed(*self.config.features, name="embed")
        hidden = nn.BatchNorm(use_running_average=True, name="norm")(table(tokens))
        return table.attend(hidden)


TIED = Family(
    name="tied",
    config_type=MLPConfig,
    module=Tied,
    inputs=lambda config: jax.ShapeDtypeStruct((1, 3), jnp.int32),
    rules=lambda config: [
        Rule("embed.weight", "params/embed/embedding", as_is()),
        Rule("norm.weight", "params/norm/scale", as_is()),
        Rule("norm.bias", "params/norm/bias", as_is()),
        Rule("norm.running_mean", "batch_stats/norm/mean", as_is()),
        Rule("norm.running_var", "batch_stats/norm/var", as_is()),
    ],
    config_of=lambda json, tensors: MLPConfig(tensors["embed.weight"].shape),
    aliases=lambda config: {"head.weight": "embed.weight"},
    buffers=batch_counters,
    ignored=("block.{i}.mask",),
)


@pytest.fixture
def tied(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """The family is known for one test; a checkpoint of it with everything that it may have."""
    monkeypatch.setitem(FAMILIES, "tied", TIED)
    tensors = dict(random_checkpoint("tied", MLPConfig((7, 4))))
    extra = {"head.weight": tensors["embed.weight"], "block.3.mask": np.ones((2, 2), bool)}
    return tensors | extra


def test_tied_names_and_counters_come_back_and_masks_do_not(
    tmp_path: Path, tied: dict[str, np.ndarray]
) -> None:
    _, params, config = load_model(saved(tmp_path, tied))
    assert config.aliases == {"head.weight": "embed.weight"}
    assert "head" not in params["params"]
    save_model(tmp_path / "out", params, config)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.ties == [("embed.weight", "head.weight")]
    written = load_checkpoint(tmp_path / "out")
    assert set(written) == set(tied) - {"block.3.mask"}
    assert all(np.array_equal(written[name], tied[name]) for name in written)
    assert written["norm.num_batches_tracked"] > 0


def test_what_a_checkpoint_may_lack_is_not_missed(
    tmp_path: Path, tied: dict[str, np.ndarray]
) -> None:
    """A tied name stays away; a counter, which torch wants, is made."""
    for name in ("head.weight", "norm.num_batches_tracked", "block.3.mask"):
        del tied[name]
    _, params, config = load_model(saved(tmp_path, tied))
    save_model(tmp_path / "out", params, config)
    written = load_checkpoint(tmp_path / "out")
    assert set(written) == {*tied, "norm.num_batches_tracked"}
    assert written["norm.num_batches_tracked"] == 0


def test_tied_names_of_other_values_are_refused(
    tmp_path: Path, tied: dict[str, np.ndarray]
) -> None:
    tied["head.weight"] = tied["head.weight"] + 1
    with pytest.raises(CheckpointError, match=r"'head.weight' tied to 'embed.weight', found other"):
        load_model(saved(tmp_path, tied))


def test_a_name_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", dict(FAMILIES))
    families.register(TIED)
    families.register(TIED)
    assert families.get("tied") is TIED
    with pytest.raises(CheckpointError, match="a family 'tied' is registered already"):
        families.register(replace(TIED, ignored=()))


def test_a_checkpoint_of_several_families_lists_them(
    tmp_path: Path, tied: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "twin", replace(TIED, name="twin"))
    path = saved(tmp_path, tied)
    with pytest.raises(
        CheckpointError, match="fits several families, name one of them: tied, twin"
    ):
        load_model(path)
    assert load_model(path, family="twin")[2].family == "twin"
