"""Checkpoints to merge, of a language model's layout: seeded random weights, and fine-tunes that differ a little."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxmerge.converters import CheckpointWriter, TensorInfo

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_RUN = 1 << 22


@dataclass(frozen=True)
class Layout:
    """A decoder in the layout of Llama: `kv` is the width of keys and values, `experts` the number in each layer."""

    layers: int
    width: int
    hidden: int
    kv: int
    vocabulary: int = 32000
    experts: int = 0

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in the order of the file."""
        yield "lm_head.weight", (self.vocabulary, self.width)
        yield "model.embed_tokens.weight", (self.vocabulary, self.width)
        for i in range(self.layers):
            layer = f"model.layers.{i}"
            yield f"{layer}.input_layernorm.weight", (self.width,)
            if self.experts:
                yield f"{layer}.mlp.gate.weight", (self.experts, self.width)
                for j in range(self.experts):
                    yield from self._mlp(f"{layer}.mlp.experts.{j}")
            else:
                yield from self._mlp(f"{layer}.mlp")
            yield f"{layer}.post_attention_layernorm.weight", (self.width,)
            for name, size in (
                ("k", self.kv),
                ("o", self.width),
                ("q", self.width),
                ("v", self.kv),
            ):
                yield f"{layer}.self_attn.{name}_proj.weight", (size, self.width)
        yield "model.norm.weight", (self.width,)

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in self.shapes())

    def _mlp(self, place: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{place}.down_proj.weight", (self.width, self.hidden)
        yield f"{place}.gate_proj.weight", (self.hidden, self.width)
        yield f"{place}.up_proj.weight", (self.hidden, self.width)


SIZES = {
    "0.1B": Layout(8, 768, 2048, 256),
    "0.3B": Layout(16, 1024, 2816, 256),
    "1.1B": Layout(22, 2048, 5632, 256),
    "3B": Layout(26, 3072, 8192, 512),
}
EXPERTS = Layout(layers=53, width=64, hidden=32, kv=64, vocabulary=1024, experts=100)
"""More than 16,000 tensors, of which the largest has 65,536 elements."""


def write(folder: Path, layout: Layout, *, model: int, seed: int = 0, change: float = 5e-4) -> Path:
    """Writes one model in bfloat16 with a config: model 0 is the base, the others differ from it by normal changes.

    Args:
      folder: where to; nothing is done where it exists.
      layout: the shapes.
      model: which one.
      seed: of all of them.
      change: standard deviation of the differences; the base's is 0.02.
    """
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    infos = [TensorInfo.of(name, shape, BFLOAT16) for name, shape in layout.shapes()]
    file = folder / "model.safetensors"
    with CheckpointWriter(file, infos, metadata={"format": "pt"}) as writer:
        for number, info in enumerate(infos):
            size = math.prod(info.shape)
            for start in range(0, size, _RUN):
                stop = min(start + _RUN, size)
                values = _normal(seed, 0, number, start, stop - start) * np.float32(0.02)
                if model:
                    changes = _normal(seed, model, number, start, stop - start)
                    values = values.astype(BFLOAT16).astype(np.float32) + change * changes
                writer.write_flat(info.name, start, values.astype(BFLOAT16))
    (folder / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", '
        f'"num_hidden_layers": {layout.layers}, "hidden_size": {layout.width}, '
        f'"intermediate_size": {layout.hidden}, "num_attention_heads": {layout.width // 64}, '
        f'"num_key_value_heads": {layout.kv // 64}, "vocab_size": {layout.vocabulary}, '
        '"torch_dtype": "bfloat16", "tie_word_embeddings": false}\n'
    )
    return folder


def _normal(seed: int, model: int, tensor: int, start: int, size: int) -> np.ndarray:
    rng = np.random.default_rng([seed, model, tensor, start])
    return rng.standard_normal(size, np.float32)
