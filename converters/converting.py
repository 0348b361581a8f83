"""From one format of checkpoints to another, tensor by tensor."""

from __future__ import annotations

import collections
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from jaxmerge.converters import dtypes, folder
from jaxmerge.converters import orbax_converting as orbax
from jaxmerge.converters.checkpoint import open_checkpoint
from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.finite import non_finite
from jaxmerge.converters.quantised import refuse_quantised
from jaxmerge.converters.reader import Checkpoint
from jaxmerge.converters.side_files import (
    side_files,
    with_dtype,
    write_described_files,
    write_json,
)
from jaxmerge.converters.tensor_info import TensorInfo
from jaxmerge.converters.torch_archive import TorchArchiveWriter
from jaxmerge.converters.writer import CheckpointWriter

Progress = Callable[[int, int], None]
# Read, cast and written at once; two are held.
_CHUNK = 1 << 24


class Converted(NamedTuple):
    """What a conversion wrote.

    Attributes:
      path: the file or folder.
      tensors: how many; tied names count one by one.
      nbytes: of the tensors.
      overflowed: name -> how many of its finite values the dtype asked for cannot hold.
      left_out: entries of a PyTorch file that are no tensors: name -> what they are.
    """

    path: Path
    tensors: int
    nbytes: int
    overflowed: Mapping[str, int]
    left_out: Mapping[str, str]


class _Sink(Protocol):
    def write_flat(self, name: str, start: int, values: Any) -> Any: ...


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    key: str | None = None,
    dtype: DTypeLike | None = None,
    shard_size: int | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Converts a checkpoint; memory holds a few chunks of one tensor, whatever the checkpoint's size.

    To orbax a model is loaded whole, as the Flax variables of its family; from orbax it gets back its family's names.
    Trees that orbax holds of no known family get their paths as names.

    A folder made from a folder also gets the other files: config, tokenizer, model card. A folder made from a GGUF file
    gets the `config.json` that its metadata stand for, and the tokenizer where it is a byte-level BPE of a known kind.

    Args:
      source: what `open_checkpoint` reads: safetensors, PyTorch, GGUF; a file, an index or a folder; or orbax's folder.
      target: a file that ends in `.safetensors` or, for PyTorch, in `.pt`, `.pth`, `.bin`, `.tar` or `.ckpt`; a
        folder that ends in `.orbax`; else a folder of safetensors. Must not exist, or be an empty folder.
      key: where the state dict stands in a PyTorch file.
      dtype: of the floating-point tensors; None: each as it is.
      shard_size: for a folder, the most bytes of tensors in one file.
      progress: called with the bytes written so far, and all bytes.

    Returns:
      What was written.

    Raises:
      CheckpointError: the source cannot be read; the target exists or its format cannot be written; a dtype was asked
        for and the source is quantised; a full disk. Nothing is left behind then.

    Example:
      >>> import tempfile
      >>> from jaxmerge.converters import load_checkpoint, save_checkpoint
      >>> made = Path(tempfile.mkdtemp())
      >>> save_checkpoint(made / "m.safetensors", {"w": np.ones(4, np.float32)})
      >>> convert(made / "m.safetensors", made / "half", dtype="bfloat16").nbytes
      8
      >>> load_checkpoint(made / "half")["w"].dtype.name
      'bfloat16'
    """
    source, target = Path(source), Path(target)
    wanted = None if dtype is None else dtypes.floating_dtype(dtype)
    to_torch = _is_torch(target)
    _check_free(target)
    if target.suffix == orbax.SUFFIX or orbax.is_orbax(source):
        if target.suffix == orbax.SUFFIX and shard_size is not None:
            raise CheckpointError(f"{target}: orbax has chunks of its own, not shards")
        return Converted(target, *orbax.convert(source, target, key, wanted, shard_size), {}, {})
    if shard_size is not None and (to_torch or target.suffix == folder.SAFETENSORS_SUFFIX):
        raise CheckpointError(f"{target}: a shard size needs a folder to write into")
    with open_checkpoint(source, key=key) as checkpoint:
        if wanted is not None:
            refuse_quantised(checkpoint.tensors, where=str(source))
        infos = [_info(info, wanted) for info in checkpoint.tensors.values()]
        place = target if _is_file(target) else target.with_name(f".{target.name}.partial")
        overflowed: dict[str, int] = {}
        try:
            if place != target:
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir(parents=True)
                _copy_side_files(source, place, checkpoint, wanted)
            order = checkpoint.disk_order()
            with _sink(place, checkpoint, infos, shard_size) as sink:
                if isinstance(sink, TorchArchiveWriter):
                    pending = set(sink.pending)
                    order = [name for name in order if name in pending]
                _pour(checkpoint, sink, {i.name: i for i in infos}, order, overflowed, progress)
            if place != target:
                place.replace(target)
        except BaseException:
            if place != target:
                shutil.rmtree(place, ignore_errors=True)
            raise
        nbytes = sum(info.nbytes for info in infos)
        return Converted(target, len(infos), nbytes, overflowed, checkpoint.skipped)


def _is_torch(target: Path) -> bool:
    return target.suffix in folder.TORCH_SUFFIXES


def _is_file(target: Path) -> bool:
    return target.suffix == folder.SAFETENSORS_SUFFIX or _is_torch(target)


def _check_free(target: Path) -> None:
    if target.suffix == folder.GGUF_SUFFIX:
        raise CheckpointError(f"{target}: GGUF is read, not written: choose safetensors or PyTorch")
    if not os.path.lexists(target):
        return
    if _is_file(target) or not target.is_dir():
        raise CheckpointError(f"{target}: exists already; remove it or choose another name")
    names = sorted(os.listdir(target))
    if names:
        some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise CheckpointError(f"{target}: the folder is not empty ({some}); choose another one")


def _info(info: TensorInfo, wanted: np.dtype | None) -> TensorInfo:
    dtype = wanted.name if wanted is not None and dtypes.is_floating(info.dtype) else info.dtype
    return TensorInfo.of(info.name, info.shape, dtype)


def _sink(
    place: Path, checkpoint: Checkpoint, infos: Iterable[TensorInfo], shard_size: int | None
) -> CheckpointWriter | TorchArchiveWriter:
    place.parent.mkdir(parents=True, exist_ok=True)
    if _is_torch(place):
        return TorchArchiveWriter(place, infos, ties=checkpoint.ties)
    return CheckpointWriter(
        place,
        infos,
        metadata={"format": "pt", **checkpoint.metadata},
        shard_size=shard_size,
        ties=checkpoint.ties,
    )


def _pour(
    checkpoint: Checkpoint,
    sink: _Sink,
    infos: Mapping[str, TensorInfo],
    order: Iterable[str],
    overflowed: dict[str, int],
    progress: Progress | None,
) -> None:
    order = list(order)
    done, total = 0, sum(infos[name].nbytes for name in order)
    for name, start, values in _ahead(_chunks(checkpoint, order)):
        wanted = dtypes.storage_dtype(infos[name].dtype)
        if values.dtype != wanted:
            cast = _cast(values, wanted)
            if ml_dtypes.finfo(wanted).max < ml_dtypes.finfo(values.dtype).max:
                lost = non_finite(cast) - non_finite(values)
                if lost:
                    overflowed[name] = overflowed.get(name, 0) + lost
            values = cast
        sink.write_flat(name, start, values)
        done += values.nbytes
        if progress is not None:
            progress(done, total)


def _cast(values: np.ndarray, wanted: np.dtype) -> np.ndarray:
    if values.dtype.name == "bfloat16" and wanted == np.float32:
        # The upper half of the same number; some six times faster than the cast.
        bits = values.view(np.uint16).astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    # What overflows is counted and reported.
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(wanted)


def _chunks(
    checkpoint: Checkpoint, order: Iterable[str]
) -> Iterator[Callable[[], tuple[str, int, np.ndarray]]]:
    """Yields what reads the next range of a tensor."""
    for name in order:
        info = checkpoint.tensors[name]
        itemsize = dtypes.storage_dtype(info.dtype).itemsize
        size, step = info.nbytes // itemsize, _CHUNK // itemsize
        for start in range(0, max(size, 1), step):
            stop = min(start + step, size)

            def read(
                name: str = name, start: int = start, stop: int = stop
            ) -> tuple[str, int, np.ndarray]:
                return name, start, checkpoint.read_flat(name, start, stop)

            yield read


def _ahead(
    reads: Iterable[Callable[[], tuple[str, int, np.ndarray]]],
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Reads one range while the one before is cast and written."""
    with ThreadPoolExecutor(1) as pool:
        waiting: collections.deque[Any] = collections.deque()
        for read in reads:
            waiting.append(pool.submit(read))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _copy_side_files(
    source: Path, place: Path, checkpoint: Checkpoint, wanted: np.dtype | None
) -> None:
    if source.is_dir():
        for name in side_files(source, apart=place):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, place / name)
    write_described_files(checkpoint, place)
    config = place / "config.json"
    if wanted is None or not config.is_file():
        return
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return
    if isinstance(found, dict) and with_dtype(found, wanted.name) != found:
        write_json(config, with_dtype(found, wanted.name))
