"""Sources and outputs that are not on this disk: on a hub, or behind a scheme."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from typer.testing import CliRunner

from jaxmerge.cli.app import app
from jaxmerge.converters import load_checkpoint, save_checkpoint
from jaxmerge.recipes import PlanError, make_plan, parse, run
from jaxmerge.recipes.hub import snapshot
from jaxmerge.recipes.remote import fetch

LINEAR = """
merge_method: linear
models:
- {{model: {a}, parameters: {{weight: 0.5}}}}
- {{model: {b}, parameters: {{weight: 0.5}}}}
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def model(seed: int) -> dict[str, np.ndarray]:
    return {"w": np.random.default_rng(seed).normal(size=(3, 2)).astype("f4")}


# Models on a hub -----------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as huggingface_hub lays it out, with one model of two revisions, and no network."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs the `hub` extra")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    cached = tmp_path / "hub" / "models--org--model"
    for revision, commit, seed in (("main", COMMIT, 0), ("v2", COMMIT[::-1], 1)):
        folder = cached / "snapshots" / commit
        (cached / "refs").mkdir(parents=True, exist_ok=True)
        (cached / "refs" / revision).write_text(commit)
        save_checkpoint(cached / "blobs", model(seed), metadata={"format": "pt"})
        folder.mkdir(parents=True)
        blob = cached / "blobs" / f"blob{seed}"
        (cached / "blobs" / "model.safetensors").rename(blob)
        (folder / "model.safetensors").symlink_to(blob)
        (folder / "config.json").write_text(json.dumps({"model_type": "x"}))
    return tmp_path


def test_names_on_the_hub_are_looked_up_in_its_cache(hub: Path) -> None:
    plan = make_plan(parse(LINEAR.format(a="org/model", b="org/model@v2")), out="out")
    run(plan)
    expected = (model(0)["w"] + model(1)["w"]) / 2
    np.testing.assert_allclose(load_checkpoint("out")["w"], expected, rtol=1e-6)
    assert json.loads(Path("out/config.json").read_text())["model_type"] == "x"
    record = json.loads(Path("out/jaxmerge.json").read_text())
    assert [source["name"] for source in record["sources"]] == ["org/model", "org/model@v2"]
    assert [source["commit"] for source in record["sources"]] == [COMMIT, COMMIT[::-1]]
    assert "base_model:\n- org/model\n- org/model@v2\n" in Path("out/README.md").read_text()


def test_a_folder_here_wins_over_a_name_on_the_hub(hub: Path) -> None:
    save_checkpoint("org/model", model(5))
    plan = make_plan(parse(LINEAR.format(a="org/model", b="org/model")))
    assert plan.sources[0].path == Path("org/model")


def test_what_is_not_in_the_cache_is_told_with_the_command_that_gets_it(hub: Path) -> None:
    with pytest.raises(PlanError, match=r"hf download org/other --revision v3"):
        make_plan(parse(LINEAR.format(a="org/model", b="org/other@v3")))


def test_without_the_extra_its_name_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'jaxmerge\[hub\]'"):
        snapshot("org/model")


def test_a_mistake_in_a_path_is_no_question_to_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    save_checkpoint("models/base", model(0))
    with pytest.raises(PlanError, match="did you mean 'models/base'"):
        make_plan(parse(LINEAR.format(a="models/bse", b="models/base")))


# Folders behind a scheme ---------------------------------------------------------------------------


class Vault(PurePosixPath):
    """A store in memory that etils.epath knows as vault://, without folders, like a bucket."""

    files: ClassVar[dict[str, bytes]] = {}

    def __new__(cls, *parts: Any) -> "Vault":
        return super().__new__(cls, *(str(part).replace("vault://", "/vault/") for part in parts))

    def exists(self) -> bool:
        return str(self) in self.files or self.is_dir()

    def is_dir(self) -> bool:
        return any(name.startswith(f"{self}/") for name in self.files)

    def iterdir(self) -> Iterator["Vault"]:
        inside = [name[len(str(self)) + 1 :] for name in self.files if name.startswith(f"{self}/")]
        return iter([self / name for name in dict.fromkeys(i.split("/")[0] for i in inside)])

    def stat(self) -> Any:
        return SimpleNamespace(length=len(self.files[str(self)]), mtime=1)

    def mkdir(self, **_: Any) -> None:
        pass

    def unlink(self) -> None:
        del self.files[str(self)]

    def open(self, mode: str) -> Any:
        name = str(self)
        if "r" in mode:
            data = self.files[name]
            return io.BytesIO(data) if "b" in mode else io.StringIO(data.decode())

        class Writer(io.BytesIO):
            def close(self) -> None:
                Vault.files[name] = self.getvalue()
                super().close()

        return Writer() if "b" in mode else io.TextIOWrapper(Writer(), write_through=True)


@pytest.fixture
def vault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    epath = pytest.importorskip("etils.epath")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    from etils.epath import register

    monkeypatch.setitem(register._URI_PREFIXES_TO_CLS, "vault://", Vault)
    assert isinstance(epath.Path("vault://x"), Vault)
    Vault.files.clear()
    for seed, name in enumerate("ab"):
        save_checkpoint(name, model(seed), metadata={"format": "pt"})
        Path(name, "config.json").write_text("{}")
        for file in Path(name).iterdir():
            Vault.files[f"/vault/{name}/{file.name}"] = file.read_bytes()
    Vault.files["/vault/a/sub/tokenizer.json"] = b"[]"
    Vault.files["/vault/a/pytorch_model.bin"] = b"the same once more"
    return Vault.files


def merge(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["merge", *arguments])


def test_sources_and_output_may_be_elsewhere(
    vault: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("recipe.yaml").write_text(LINEAR.format(a="vault://a", b="vault://b"))
    result = merge("recipe.yaml", "vault://deep/out")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("vault://deep/out: 1 tensors merged by linear")
    names = {name.removeprefix("/vault/deep/out/") for name in vault if "/deep/" in name}
    assert names == {
        *("model.safetensors", "config.json", "jaxmerge.json", "recipe.yaml", "README.md"),
        "sub/tokenizer.json",
    }
    Path("local").mkdir()
    Path("local/model.safetensors").write_bytes(vault["/vault/deep/out/model.safetensors"])
    expected = (model(0)["w"] + model(1)["w"]) / 2
    np.testing.assert_allclose(load_checkpoint("local")["w"], expected, rtol=1e-6)

    opened = Vault.open
    reads: list[str] = []

    def counting(self: Vault, mode: str) -> Any:
        reads.append(f"{mode} {self}")
        return opened(self, mode)

    monkeypatch.setattr(Vault, "open", counting)
    fetch("vault://a")
    assert reads == []
    again = merge("recipe.yaml", "vault://deep/out")
    assert again.exit_code == 2
    assert "vault://deep/out: is there already" in again.stderr


def test_an_output_that_was_published_in_part_is_published_again(
    vault: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("recipe.yaml").write_text(LINEAR.format(a="a", b="b"))
    opened = Vault.open

    def failing(self: Vault, mode: str) -> Any:
        if "w" in mode and self.name == "config.json":
            raise OSError(5, "the connection is lost")
        return opened(self, mode)

    with monkeypatch.context() as patched:
        patched.setattr(Vault, "open", failing)
        result = merge("recipe.yaml", "vault://out")
    assert result.exit_code == 1
    assert "/vault/out/config.json" not in vault
    assert "/vault/out/jaxmerge-unfinished.jsonl" in vault
    assert merge("recipe.yaml", "vault://out").exit_code == 0
    assert "/vault/out/config.json" in vault
    assert "/vault/out/jaxmerge-unfinished.jsonl" not in vault
    assert list(Path("cache/jaxmerge/outputs").iterdir()) == []


def test_what_is_not_there_and_unknown_schemes_are_told(vault: dict[str, bytes]) -> None:
    with pytest.raises(PlanError, match="there is nothing at vault://none"):
        make_plan(parse(LINEAR.format(a="vault://a", b="vault://none")))
    with pytest.raises(PlanError, match="nothing is known of safe://"):
        make_plan(parse(LINEAR.format(a="vault://a", b="safe://none")))
