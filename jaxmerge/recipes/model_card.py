"""The model card of a merge: a README.md that model hubs understand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jaxmerge.recipes.output import bytes_text

CARD = "README.md"
# Its name where the donor's own card was copied.
SECOND_CARD = "README-merge.md"


def card(record: Mapping[str, Any], name: str, *, for_transformers: bool) -> str:
    """Returns the text of the card.

    Args:
        record: what `provenance.record` gives.
        name: of the merged model.
        for_transformers: the folder has a `config.json`.
    """
    front: dict[str, Any] = {"base_model": [source["name"] for source in record["sources"]]}
    if for_transformers:
        front["library_name"] = "transformers"
    front["tags"] = ["jaxmerge", "merge"]
    methods = sorted({made["method"] for made in record["tensors"] if made["action"] == "merge"})
    rows = [
        f"| {source['name']} | {file['name']} | {bytes_text(file['bytes'])} | `{file['sha256']}` |"
        for source in record["sources"]
        for file in source["files"]
    ]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
            "---",
            f"# {name}",
            "",
            f"A merge of pre-trained models, made with jaxmerge {record['jaxmerge']} "
            f"(jax {record['versions']['jax']}) by {_listed(methods) or 'copying'}, "
            f"seed {record['seed']}.",
            "",
            "## Recipe",
            "",
            "```yaml",
            record["recipe"].rstrip(),
            "```",
            "",
            *_aligned(record),
            "## Sources",
            "",
            "| model | file | size | sha256 |",
            "|---|---|---:|---|",
            *rows,
            "",
            "`jaxmerge.json` says how every tensor was made. `jaxmerge reproduce FOLDER` makes the "
            "merge again and compares.",
            "",
        ]
    )


def write_card(folder: Path, record: Mapping[str, Any], name: str, *, copied: bool) -> None:
    """Writes the card, beside one that was copied from a source."""
    file = folder / (SECOND_CARD if copied else CARD)
    whole = card(record, name, for_transformers=(folder / "config.json").exists())
    file.write_text(whole, encoding="utf-8")


def _aligned(record: Mapping[str, Any]) -> list[str]:
    """What is said of models that were brought into another order."""
    if "alignment" not in record:
        return []
    how = record["alignment"]
    compared = {
        "weight": "weights",
        "activation": "activations",
        "dual": f"weights (share {how['alpha']}) and activations",
    }
    names = ", ".join(f"{one['model']} (similarity {one['score']:.3f})" for one in how["models"])
    return [
        "## Alignment",
        "",
        f"Before the merge the units of {names} were brought into the order of {how['to']} by their "
        f"{compared[how['method']]}. `alignment.json` has the permutations.",
        "",
    ]


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
