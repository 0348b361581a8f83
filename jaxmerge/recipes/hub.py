"""Models by their names on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Copies of the weights in formats that are not read from a hub.
_NEVER = ["*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.tflite", "original/*", "onnx/*"]
_TORCH = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin.index.json"]


def is_hub_name(path: str) -> bool:
    """Whether a path that does not exist may be a model's name on the hub: `organisation/model`.

    A first part that is a folder here makes it a path with a mistake in it.

    >>> is_hub_name("mistralai/Mistral-7B-v0.1"), is_hub_name("./model"), is_hub_name("a/b/c")
    (True, False, False)
    """
    return _NAME.fullmatch(path) is not None and not os.path.isdir(path.split("/")[0])


def snapshot(name: str, revision: str | None = None) -> Path:
    """Returns the folder of a model in the hub's cache, downloading what is not there.

    Weights are safetensors, or PyTorch files where there are none. Nothing is downloaded where
    HF_HUB_OFFLINE=1 is set.

    Args:
        name: `organisation/model`.
        revision: a branch, a tag or a commit; None: the main branch.

    Raises:
        FileNotFoundError: huggingface_hub is not installed, there is no such model or revision, or it
            cannot be downloaded.
    """
    shown = name if revision is None else f"{name}@{revision}"
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise FileNotFoundError(
            f"no file or folder {shown!r}; if it is a model on the Hugging Face hub: names on the hub "
            "need the package huggingface_hub: pip install 'jaxmerge[hub]'"
        ) from None

    def download(ignored: list[str]) -> Path:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, ignore_patterns=ignored)
        )

    try:
        folder = download([*_NEVER, *_TORCH])
        if not any(folder.glob("*.safetensors")):
            folder = download(_NEVER)
    except errors.LocalEntryNotFoundError:
        raise FileNotFoundError(
            f"no file or folder {shown!r}, and the Hugging Face hub cannot be asked for it; download "
            f"it where there is a network: {_command(name, revision)}"
        ) from None
    except errors.GatedRepoError:
        raise FileNotFoundError(
            f"{shown}: its authors ask for your consent on the Hugging Face hub; then `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{shown}: the model has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"no file or folder {shown!r}, and no such model on the Hugging Face hub (a private one "
            "needs `hf auth login`)"
        ) from None
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise FileNotFoundError(f"{shown}: {str(error).splitlines()[0]}") from None
    return folder


def commit_of(folder: Path) -> str | None:
    """Returns the commit of a model in the hub's cache; None for any other folder.

    >>> commit_of(Path("hub/models--a--b/snapshots/0123abc"))
    '0123abc'
    """
    return folder.name if folder.parent.name == "snapshots" else None


def _command(name: str, revision: str | None) -> str:
    return f"hf download {name}" + (f" --revision {revision}" if revision else "")
