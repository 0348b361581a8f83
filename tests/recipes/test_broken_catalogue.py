"""Everything that can be wrong with a merge is said by its plan, before a tensor is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipes.layered import draw, save

from jaxmerge.converters import Checkpoint, save_checkpoint
from jaxmerge.recipes import make_plan, parse
from jaxmerge.recipes.errors import PlanError, RecipeError

Change = Callable[[Path], Any] | None


def linear(extra: str = "", models: str = "[{model: a}, {model: b}]") -> str:
    return f"merge_method: linear\nmodels: {models}\nparameters: {{weight: 1}}\n{extra}"


def ties(extra: str) -> str:
    return f"merge_method: ties\nbase_model: base\nmodels: [{{model: a}}, {{model: b}}]\n{extra}"


def slices(text: str, method: str = "passthrough", extra: str = "") -> str:
    return f"merge_method: {method}\nslices:\n{text}\n{extra}"


def changed(**tensors: np.ndarray | None) -> Callable[[Path], None]:
    """Writes model b again, with other tensors; dots in names are written as two underscores."""

    def write(folder: Path) -> None:
        found: dict[str, np.ndarray] = draw(1)
        for name, tensor in tensors.items():
            name = name.replace("__", ".")
            found.pop(name, None)
            if tensor is not None:
                found[name] = tensor
        shutil.rmtree(folder / "b")
        save(folder / "b", found)

    return write


def file(name: str, content: bytes | str) -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)

    return write


def configured(**entries: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "b" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

    return write


def truncated(folder: Path) -> None:
    path = folder / "b" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def emptied(folder: Path) -> None:
    shutil.rmtree(folder / "b")
    (folder / "b").mkdir()


def networks(**changes: np.ndarray) -> Callable[[Path], None]:
    """Writes models a and b as MLPs that can be aligned, and inputs; b with other tensors."""

    def write(folder: Path) -> None:
        rng = np.random.default_rng(0)
        shapes = {"fc1.weight": (5, 4), "fc1.bias": (5,), "fc2.weight": (3, 5), "fc2.bias": (3,)}
        tensors = {name: rng.standard_normal(s).astype("f4") for name, s in shapes.items()}
        own = {name.replace("__", "."): tensor for name, tensor in changes.items()}
        for name, found in (("a", tensors), ("b", {**tensors, **own})):
            shutil.rmtree(folder / name)
            save_checkpoint(folder / name, found)
        np.save(folder / "x.npy", np.ones((2, 4), np.float32))
        np.save(folder / "wide.npy", np.ones((2, 5), np.float32))

    return write


def network_with_an_adapter(folder: Path) -> None:
    networks()(folder)
    weights = {
        "base_model.model.fc1.lora_A.weight": np.ones((1, 4), np.float32),
        "base_model.model.fc1.lora_B.weight": np.ones((5, 1), np.float32),
    }
    (folder / "lora").mkdir()
    save_checkpoint(folder / "lora" / "adapter_model.safetensors", weights)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["fc1"]}
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(config))


INDEX = {"weight_map": {"w": "../a/model.safetensors"}}


def escaping(folder: Path) -> None:
    emptied(folder)
    (folder / "b" / "model.safetensors.index.json").write_text(json.dumps(INDEX))


CATALOGUE: dict[str, tuple[str, Change, str]] = {
    # The recipe's form
    "misspelt key": (linear("dtyp: float32"), None, "unknown key 'dtyp'; did you mean 'dtype'"),
    "misspelt method": (
        linear().replace("linear", "liner"),
        None,
        "unknown method 'liner'; did you mean 'linear'",
    ),
    "misspelt parameter": (
        ties("parameters: {weigth: 1}"),
        None,
        "no parameter 'weigth'; did you mean 'weight'",
    ),
    "unknown dtype": (linear("dtype: float17"), None, "unknown dtype 'float17'"),
    "no models": ("merge_method: linear", None, "models"),
    "an empty list of models": (linear(models="[]"), None, "the list is empty"),
    "models and slices": (
        linear("slices: [{sources: [{model: a, layer_range: [0, 1]}]}]"),
        None,
        "slices",
    ),
    "a key twice": (linear("dtype: float32\ndtype: float32"), None, "given twice"),
    "text for a number": (ties("parameters: {weight: heavy}"), None, "'heavy' is not a number"),
    "infinite weight": (ties("parameters: {weight: .inf}"), None, "not a finite number"),
    "an empty gradient": (ties("parameters: {weight: []}"), None, "the list is empty"),
    "a choice without a value": (
        ties("parameters: {weight: [{filter: mlp}]}"),
        None,
        "needs a `value`",
    ),
    "a misspelt filter": (
        ties("parameters: {weight: [{fliter: mlp, value: 1}]}"),
        None,
        "unknown key 'fliter'",
    ),
    "a range that runs backwards": (
        slices("- sources: [{model: a, layer_range: [2, 1]}]"),
        None,
        r"found \[2, 1\]",
    ),
    "a range of one number": (
        slices("- sources: [{model: a, layer_range: 2}]"),
        None,
        r"expected \[first, end\]",
    ),
    # What the method asks for
    "no base": (
        ties("parameters: {weight: 1}").replace("base_model: base\n", ""),
        None,
        "needs `base_model`",
    ),
    "no weight": (ties("parameters: {density: 1}"), None, "needs 'weight'"),
    "a weight for some tensors only": (
        ties("parameters: {weight: [{filter: mlp, value: 1}]}"),
        None,
        "no filter lets 'model.embed_tokens.weight' through",
    ),
    "a density above 1": (ties("parameters: {weight: 1, density: 1.5}"), None, "must lie in"),
    "a density below 0 in a gradient": (
        ties("parameters: {weight: 1, density: [0.5, -0.1]}"),
        None,
        "must lie in",
    ),
    "too many models": (
        "merge_method: slerp\nbase_model: base\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.5}",
        None,
        "slerp takes 2 models, the base counted; found 3",
    ),
    # Layers and modules
    "layers beyond the end": (
        slices("- sources: [{model: a, layer_range: [1, 4]}]"),
        None,
        r"layer_range \[1, 4\] goes beyond the 3 layers of a",
    ),
    "slices of different lengths": (
        slices(
            "- sources: [{model: a, layer_range: [0, 3]}, {model: b, layer_range: [0, 2]}]",
            "linear",
            "parameters: {weight: 1}",
        ),
        None,
        "layers",
    ),
    "an unknown module": (
        "merge_method: linear\nmodules: {vision_towr: {models: [{model: a}]}}\nparameters: {weight: 1}",
        None,
        "has no module 'vision_towr'",
    ),
    # The checkpoints
    "a missing model": (
        linear(models="[{model: a}, {model: bb}]"),
        None,
        "bb.*did you mean 'b'|bb.*no such",
    ),
    "an empty folder": (linear(), emptied, "no checkpoint"),
    "a truncated file": (linear(), truncated, "b"),
    "a file that is no checkpoint": (
        linear(),
        file("b/model.safetensors", b"PK\x03\x04 not at all"),
        "model.safetensors",
    ),
    "an index that leads outside": (linear(), escaping, "own folder"),
    "a missing tensor": (
        linear(),
        changed(model__norm__weight=None),
        "tensor 'model.norm.weight' is missing",
    ),
    "an additional tensor": (
        linear(),
        changed(model__norm__bias=np.ones(4, np.float32)),
        "extra tensor 'model.norm.bias'",
    ),
    "another shape": (
        linear(),
        changed(model__norm__weight=np.ones(5, np.float32)),
        r"'model.norm.weight' has shape \[5\], expected \[4\]",
    ),
    "another kind of number": (
        linear(),
        changed(model__norm__weight=np.ones(4, np.int32)),
        "is int32, expected a kind of float",
    ),
    "another vocabulary": (
        linear(),
        changed(lm_head__weight=np.ones((7, 4), np.float32)),
        "the vocabularies differ",
    ),
    "complex numbers": (
        linear(models="[{model: b}]"),
        changed(model__norm__weight=np.ones(4, np.complex64)),
        "complex",
    ),
    "a quantised model": (
        linear(),
        configured(quantization_config={"quant_method": "gptq"}),
        "gptq",
    ),
    "a broken config": (linear(), file("b/config.json", "{"), "config.json"),
    "an adapter that is none": (linear(models="[{model: a+b}]"), None, "adapter"),
    # Alignment
    "a misspelt key of align": (linear("align: {aplha: 1}"), None, "did you mean 'alpha'"),
    "models of no family": (linear("align:"), None, "(?s)`align`: a: .*`align`: b: "),
    "a misspelt family": (
        linear("align: {family: mlp_cf}"),
        networks(),
        "^recipe.yaml:4: `align`: no family 'mlp_cf'. Nearest: 'mlp_fc'",
    ),
    "a reference that is no model": (
        linear("align: {to: c}"),
        None,
        "`align.to`: 'c' is none of the models",
    ),
    "nothing to align": (
        linear("align:", models="[{model: a}]"),
        networks(),
        "there is no other model to bring into the order of a",
    ),
    "activations without inputs": (
        linear("align: {method: dual}"),
        networks(),
        "compares activations: give `data`",
    ),
    "inputs that are not there": (
        linear("align: {data: y.npy}"),
        networks(),
        "recipe.yaml:4: `align`: no file 'y.npy'; did you mean 'x.npy'",
    ),
    "inputs of another shape": (
        linear("align: {data: wide.npy}"),
        networks(),
        r"expected numbers \[n, 4\], found float32 \[2, 5\]",
    ),
    "inputs that are none": (
        linear("align: {data: a/model.safetensors}"),
        networks(),
        "no .npy or .npz file",
    ),
    "models to align of different widths": (
        linear("align:"),
        networks(
            fc1__weight=np.ones((6, 4), np.float32),
            fc1__bias=np.ones(6, np.float32),
            fc2__weight=np.ones((3, 6), np.float32),
        ),
        r"expected \[5, 4\] as in a",
    ),
    "a model to align with an adapter": (
        linear("align:", models="[{model: a}, {model: b+lora}]"),
        network_with_an_adapter,
        "b[+]lora: a model with an adapter cannot be aligned",
    ),
    "layers to align": (
        slices("- sources: [{model: a, layer_range: [0, 3]}]", extra="align:"),
        None,
        "`align` needs `models`",
    ),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("a", "b", "base")):
        save(tmp_path / name, draw(i))
    return tmp_path


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_plan_says_what_is_wrong(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read")

    recipe, change, message = CATALOGUE[name]
    if change is not None:
        change(folder)
    monkeypatch.setattr(Checkpoint, "read", refuse)
    monkeypatch.setattr(Checkpoint, "read_flat", refuse)
    with pytest.raises((RecipeError, PlanError), match=message):
        make_plan(parse(recipe, filename="recipe.yaml"), out=folder / "out")
    assert not (folder / "out").exists()
