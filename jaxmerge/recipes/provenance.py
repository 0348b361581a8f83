"""What stands in a merged model about how it was made: recipe, sources, versions, seed, every tensor's numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmerge._version import __version__
from jaxmerge.recipes.hub import commit_of
from jaxmerge.recipes.output import ALIGNMENT, RECORD
from jaxmerge.recipes.plan import Plan, PlannedTensor
from jaxmerge.recipes.schema import dump

# The entry of a safetensors file's metadata.
METADATA_KEY = "jaxmerge"
# Takes as many bytes as a hash: headers are laid out before the sources have been read.
UNKNOWN = "0" * 64

Hashes = Mapping[str, str]


def record(plan: Plan, tensors: Sequence[Mapping[str, Any]], hashes: Hashes) -> dict[str, Any]:
    """Returns what decides the values of a merged model, and where it came from, as plain data.

    No path of this machine is in it: sources have the names that the recipe gives them.

    Args:
        plan: what was carried out, its models aligned.
        tensors: how tensors were made, see `settings`.
        hashes: sha256 (hex) of the sources' files by path; `UNKNOWN` stands for those left out.
    """
    return {
        "jaxmerge": __version__,
        "versions": {"jax": jax.__version__, "numpy": np.__version__},
        "recipe": dump(plan.resolved.recipe),
        "resolved": plan.resolved.to_dict(),
        "seed": plan.seed,
        "sources": [
            {
                "name": source.name,
                "key": source.key,
                "commit": commit_of(source.path),
                "format": source.format,
                "files": [
                    {
                        "name": Path(file).name,
                        "bytes": size,
                        "sha256": hashes.get(file, UNKNOWN),
                    }
                    for file, size, _ in source.files
                ],
            }
            for source in plan.sources
        ],
        "tensors": tensors,
        **_alignment(plan),
    }


def settings(plan: Plan) -> list[dict[str, Any]]:
    """Returns how tensors were made: one entry for all that were made alike.

    Each has the action or the method with its options, the hyperparameters, the models and the
    base as indices into the sources, and the tensors' names; for tensors that have other names in
    the sources (layers that moved) those of the base, if there is one, and the models.
    """
    groups: dict[Hashable, dict[str, Any]] = {}
    for tensor in plan.tensors:
        sources = tuple(one.source for one in tensor.models)
        base = None if tensor.base is None else tensor.base.source
        key = (tensor.action, tensor.merge, sources, base, *sorted(tensor.hyperparameters.items()))
        if key not in groups:
            groups[key] = {**_made(plan, tensor), "names": []}
        groups[key]["names"].append(tensor.name)
        given = [one.name for one in tensor.inputs]
        if any(name != tensor.identity for name in given):
            groups[key].setdefault("from", {})[tensor.name] = given
    return list(groups.values())


def metadata(made: Mapping[str, Any]) -> dict[str, str]:
    """Returns the entries for a safetensors file's metadata; as long for any hashes.

    Args:
        made: what `record` gives.
    """
    return {METADATA_KEY: json.dumps(made, ensure_ascii=False, separators=(",", ":"))}


def write_record(plan: Plan, folder: Path, made: Mapping[str, Any], tensors: Hashes) -> None:
    """Writes `recipe.yaml`, the recipe as it ran, and `jaxmerge.json`, all that is known of the merge.

    Args:
        plan: what was carried out.
        folder: the output.
        made: what `record` gives.
        tensors: sha256 (hex) of each tensor's bytes in the output; empty for a PyTorch file.
    """
    (folder / "recipe.yaml").write_text(dump(plan.resolved.recipe), encoding="utf-8")
    known = {
        **made,
        "notes": list(plan.notes),
        "sha256": {tensor.name: tensors[tensor.name] for tensor in plan.tensors if tensors},
        "fingerprint": plan.fingerprint,
    }
    text = json.dumps(known, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def write_alignment(plan: Plan, folder: Path) -> None:
    """Writes `alignment.json` where models were aligned: the permutations, and how well the units match."""
    if plan.aligned is None:
        return
    models = [
        {"model": plan.sources[index].name, **one} for index, one in plan.aligned.found.items()
    ]
    whole = {**_alignment(plan)["alignment"], "models": models}
    text = json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / ALIGNMENT).write_text(text + "\n", encoding="utf-8")


def permutations_digest(found: Mapping[str, Any]) -> str:
    """Returns the sha256 (hex) of the permutations that a matching found."""
    text = json.dumps(found["permutations"], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _alignment(plan: Plan) -> dict[str, Any]:
    """What decides an alignment, and how it went, without the permutations themselves."""
    if plan.alignment is None or plan.aligned is None:
        return {}
    planned, models = plan.alignment.to_dict(plan.sources), []
    for index, one in plan.aligned.found.items():
        went = {name: one[name] for name in ("score", "sweeps", "settled")}
        digest = permutations_digest(one)
        models.append({"model": plan.sources[index].name, **went, "permutations": digest})
    data = None
    if planned["data"] is not None:
        data = {"name": planned["data"], "sha256": plan.aligned.data}
    return {"alignment": {**planned, "data": data, "models": models}}


def _made(plan: Plan, tensor: PlannedTensor) -> dict[str, Any]:
    if tensor.action == "carry":
        return {"action": "carry", "models": [tensor.models[0].source]}
    merge = plan.merges[tensor.merge]
    return {
        "action": "merge",
        "method": merge.method.name,
        "options": dict(merge.options),
        "hyperparameters": {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in tensor.hyperparameters.items()
        },
        "models": [model.source for model in tensor.models],
        "base": None if tensor.base is None else tensor.base.source,
    }
