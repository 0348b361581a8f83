"""Reading PyTorch checkpoints of one or several files."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from types import ModuleType
from typing import Any, Self

import numpy as np

from jaxmerge.converters import dtypes, mapped_pages, state_dict_key, ties, torch_file
from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.reader import Checkpoint
from jaxmerge.converters.tensor_info import TensorInfo
from jaxmerge.converters.torch_tensors import dtype_of, identity, import_torch, to_numpy

# A tensor may be a stretched view of few bytes (strides of 0); more than this is an attack.
_MOST_STRETCH = 16
_ALWAYS_FINE = 1 << 26


class TorchCheckpoint(Checkpoint):
    """The state dict of one PyTorch file, or of the shards of one checkpoint."""

    format = "torch"

    def __init__(
        self,
        path: str,
        torch: ModuleType,
        tensors: Mapping[str, Any],
        infos: Mapping[str, TensorInfo],
        *,
        key: str | None,
        skipped: Mapping[str, str],
        mapped: Mapping[str, bool],
    ) -> None:
        identities: dict[str, Hashable | None] = {
            name: identity(tensor) for name, tensor in tensors.items()
        }
        super().__init__(path, infos, ties=ties.group_by(identities), key=key, skipped=skipped)
        self._torch = torch
        self._tensors = dict(tensors)
        self._mapped = dict(mapped)

    @classmethod
    def open(cls, path: str, files: Sequence[str], key: str | None) -> Self:
        """Opens the files and selects the state dict in each.

        Args:
          path: what the user named: a file or a folder.
          files: the PyTorch files of the checkpoint.
          key: where the state dict stands, or None.

        Returns:
          The open checkpoint.

        Raises:
          CheckpointError: torch is missing, or a file is broken, hostile or has no such state dict.
        """
        torch = import_torch(path)

        def is_tensor(value: object) -> bool:
            return isinstance(value, torch.Tensor)

        tensors: dict[str, Any] = {}
        infos: dict[str, TensorInfo] = {}
        skipped: dict[str, str] = {}
        mapped: dict[str, bool] = {}
        used: str | None = None
        for file in files:
            loaded = torch_file.load(torch, file)
            state, path_of_keys = state_dict_key.select(loaded.structure, key, is_tensor, file)
            used = ".".join(path_of_keys) or None
            own, others = state_dict_key.split(state, is_tensor, file)
            for name, tensor in own.items():
                if name in tensors:
                    raise CheckpointError(
                        f"{path}: tensor {name!r} stands in two files: {infos[name].file} and "
                        f"{file}"
                    )
                dtype = dtype_of(torch, tensor, f"{file}: tensor {name!r}")
                infos[name] = TensorInfo.of(name, tuple(tensor.shape), dtype, file)
            _check_stretch(torch, own, infos, file)
            tensors.update(own)
            skipped.update(others)
            mapped[file] = loaded.mapped
        return cls(path, torch, tensors, infos, key=used, skipped=skipped, mapped=mapped)

    def close(self) -> None:
        """Lets go of the files; reading afterwards is an error. Closing twice is not."""
        self._tensors.clear()

    def _read(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        tensor = self._tensors.get(info.name)
        if tensor is None:
            raise CheckpointError(f"{self.path}: tensor {info.name!r}: the checkpoint is closed")
        part = tensor.detach().reshape(-1)[start:stop]
        array = to_numpy(self._torch, part, dtypes.storage_dtype(info.dtype))
        if self._mapped[info.file] and tensor.is_contiguous():
            mapped_pages.drop(part.data_ptr(), array.nbytes)
        return array


def _check_stretch(
    torch: ModuleType, tensors: Mapping[str, Any], infos: Mapping[str, TensorInfo], file: str
) -> None:
    held: dict[int, int] = {}
    asked: dict[Hashable, int] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        asked[identity(tensor)] = infos[name].nbytes
    most = max(_MOST_STRETCH * sum(held.values()), _ALWAYS_FINE)
    if sum(asked.values()) > most:
        worst = max(tensors, key=lambda name: infos[name].nbytes)
        raise CheckpointError(
            f"{file}: tensor {worst!r}: {infos[worst].dtype}{list(infos[worst].shape)}: expected "
            f"tensors of about the {sum(held.values())} bytes stored, found views that unfold them "
            f"to {sum(asked.values())}"
        )
