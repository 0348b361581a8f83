"""Everything in a model's folder that is not weights: it goes with the model."""

from __future__ import annotations

import collections
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxmerge.converters import open_checkpoint
from jaxmerge.converters import side_files as converters
from jaxmerge.recipes.model_card import CARD, SECOND_CARD
from jaxmerge.recipes.output import ALIGNMENT, RECORD, is_journal
from jaxmerge.recipes.plan import Plan
from jaxmerge.recipes.tokenizers import FILES

CONFIG = "config.json"
# Written anew by every merge, or speaking of the source alone.
_GENERATED = frozenset({ALIGNMENT, RECORD, "recipe.yaml"})


def write_side_files(plan: Plan, target: Path) -> None:
    """Writes all that loaders of a merged model need beside its weights.

    Every file of the donor's folder, nested ones too, that is not weights is copied. Code is data: it
    is copied, and never run. Links to files are followed, as the files of a hub's cache are links;
    links to folders are not. A GGUF file, which has no folder of its own, says itself what `config.json`
    and the tokenizer are. Where the plan has a config, or files of a tokenizer, they take the places of
    the donor's. `config.json` gets the output's dtype.

    Args:
        plan: whose first source is the donor.
        target: the output folder.
    """
    source = plan.sources[0]
    donor = source.path
    tokenizer = plan.tokenizer_files
    for name in side_files(donor, apart=target):
        if tokenizer is not None and str(name) in FILES:
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(donor / name, target / name)
    if source.format == "gguf":
        with open_checkpoint(donor) as checkpoint:
            converters.write_described_files(checkpoint, target)
    if tokenizer is not None:
        for given, path in tokenizer.copied.items():
            shutil.copyfile(path, target / given)
        for given, text in tokenizer.written.items():
            (target / given).write_text(text, encoding="utf-8", newline="")
    if plan.config is not None:
        converters.write_json(target / CONFIG, plan.config)
    _write_dtype(plan, target)


def side_files(folder: Path, *, apart: Path | None = None) -> Iterator[Path]:
    """Yields the files of a model's folder that are not weights and that no merge writes, by their names within it.

    The model card of an earlier merge is none of them.

    Args:
        folder: of a model; a file has none.
        apart: a folder within it whose files are none of the model's: the output.
    """
    written = {*_GENERATED}
    if (folder / RECORD).exists():
        written.add(SECOND_CARD if (folder / SECOND_CARD).exists() else CARD)
    return (
        name
        for name in converters.side_files(folder, apart=apart)
        if str(name) not in written and not is_journal(str(name))
    )


def _write_dtype(plan: Plan, target: Path) -> None:
    """Says in the output's `config.json` in which dtype its weights are.

    The dtype is that of most merged bytes. Where the config, or one nested in it, has `dtype` or
    `torch_dtype`, that entry is set. Where it has neither and the recipe asks for a dtype,
    `torch_dtype` is added, which all versions of transformers read.
    """
    file = target / CONFIG
    sizes: collections.Counter[str] = collections.Counter()
    for tensor in plan.tensors:
        if tensor.action == "merge":
            sizes[tensor.dtype] += tensor.nbytes
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if not sizes or not isinstance(config, dict):
        return
    dtype = sizes.most_common(1)[0][0]
    found = converters.with_dtype(config, dtype)
    if plan.resolved.written_dtype and not any(key in config for key in converters.DTYPE_KEYS):
        found["torch_dtype"] = dtype
    if found != config:
        converters.write_json(file, found)
