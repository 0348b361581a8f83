"""What stands beside a merged model: the recipe that made it, and where everything came from."""

from __future__ import annotations

import json
from pathlib import Path

import jax

from jaxmerge._version import __version__
from jaxmerge.recipes.plan import Plan
from jaxmerge.recipes.schema import dump


def write_provenance(plan: Plan, folder: Path) -> None:
    """Writes `recipe.yaml`, the recipe as it ran, and `jaxmerge.json`, what it was resolved to."""
    (folder / "recipe.yaml").write_text(dump(plan.resolved.recipe), encoding="utf-8")
    record = {
        "jaxmerge": __version__,
        "jax": jax.__version__,
        "fingerprint": plan.fingerprint,
        "seed": plan.seed,
        "resolved": plan.resolved.to_dict(),
        "sources": [
            {
                "name": source.name,
                "key": source.key,
                "format": source.format,
                "files": [
                    {"name": Path(file).name, "bytes": size} for file, size, _ in source.files
                ],
            }
            for source in plan.sources
        ],
        "notes": list(plan.notes),
    }
    text = json.dumps(record, indent=2, allow_nan=False)
    (folder / "jaxmerge.json").write_text(text + "\n", encoding="utf-8")
