"""GGUF files: dequantised, in Hugging Face's names and row order, with the configuration that they stand for."""

import contextlib
import itertools
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxmerge.converters import (
    CheckpointError,
    convert,
    gguf_names,
    load_checkpoint,
    load_model,
    open_checkpoint,
)
from jaxmerge.recipes import make_plan, parse, run

gguf = pytest.importorskip("gguf", reason="needs the `gguf` extra")

HEADS, KEY_HEADS, SIZE, WIDTH, HIDDEN, WORDS, LAYERS = 4, 2, 6, 32, 64, 10, 2


def decoder(seed: int = 0, tied: bool = False) -> dict[str, np.ndarray]:
    """A tiny decoder in Hugging Face's layout."""
    shapes = {"model.embed_tokens.weight": (WORDS, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (WIDTH,),
                "post_attention_layernorm": (WIDTH,),
                "self_attn.q_proj": (HEADS * SIZE, WIDTH),
                "self_attn.k_proj": (KEY_HEADS * SIZE, WIDTH),
                "self_attn.v_proj": (KEY_HEADS * SIZE, WIDTH),
                "self_attn.o_proj": (WIDTH, HEADS * SIZE),
                "mlp.gate_proj": (HIDDEN, WIDTH),
                "mlp.up_proj": (HIDDEN, WIDTH),
                "mlp.down_proj": (WIDTH, HIDDEN),
            }.items()
        }
    if not tied:
        shapes["lm_head.weight"] = (WORDS, WIDTH)
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def interleaved(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Row j of a head's first half, then row j of its second half, and so on."""
    size = len(tensor) // heads
    rows = [
        head * size + half * size // 2 + j
        for head in range(heads)
        for j in range(size // 2)
        for half in range(2)
    ]
    return tensor[rows]


def write(
    path: Path,
    architecture: str,
    tensors: dict[str, np.ndarray],
    quantised: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    **fields: Any,
) -> None:
    """Writes a GGUF file of tensors under GGUF's names."""
    writer = gguf.GGUFWriter(path, architecture)
    numbers = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": WIDTH,
        "feed_forward_length": HIDDEN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KEY_HEADS,
        "rope.dimension_count": SIZE,
        **fields,
    }
    for name, value in numbers.items():
        if name not in drop:
            add = writer.add_string if isinstance(value, str) else writer.add_uint32
            add = writer.add_float32 if isinstance(value, float) else add
            add(f"{architecture}.{name}", value)
    epsilon = "layer_norm_epsilon" if architecture == "gpt2" else "layer_norm_rms_epsilon"
    writer.add_float32(f"{architecture}.attention.{epsilon}", 1e-5)
    writer.add_name("tiny")
    writer.add_token_list(["a", "b"])
    writer.add_token_scores([0.5, 1.5])
    writer.add_bos_token_id(1)
    for name, tensor in tensors.items():
        kind = (quantised or {}).get(name)
        if kind is None:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(architecture: Any, name: str) -> str:
    """The name that the `gguf` package gives a tensor of Hugging Face's."""
    names = gguf.get_tensor_name_map(architecture, LAYERS)
    return names.get_name(name, try_suffixes=(".weight", ".bias"))


def as_gguf(tensors: dict[str, np.ndarray], architecture: str = "llama") -> dict[str, np.ndarray]:
    """What a converter to GGUF makes of the tensors of a decoder."""
    number = gguf.MODEL_ARCH[architecture.upper()]
    made = {}
    for name, tensor in tensors.items():
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            tensor = interleaved(tensor, HEADS if "q_proj" in name else KEY_HEADS)
        if architecture == "gemma" and name.endswith("norm.weight"):
            tensor = tensor + np.float32(1)
        made[gguf_name(number, name)] = tensor
    return made


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    path = tmp_path / "llama.gguf"
    write(path, "llama", as_gguf(decoder()))
    return path


def test_a_llama_comes_back_in_hugging_faces_names_and_row_order(llama: Path) -> None:
    expected = decoder()
    with open_checkpoint(llama) as checkpoint:
        assert checkpoint.format == "gguf"
        assert checkpoint.metadata["general.name"] == "tiny"
        assert set(checkpoint.tensors) == set(expected)
        for name, tensor in expected.items():
            assert checkpoint.tensors[name].shape == tensor.shape
            np.testing.assert_array_equal(checkpoint.read(name), tensor)
    np.testing.assert_equal(load_checkpoint(llama.parent), expected)


def test_any_range_is_that_part_of_the_whole(llama: Path) -> None:
    expected = decoder()
    with open_checkpoint(llama) as checkpoint:
        for name in ("model.layers.1.self_attn.k_proj.weight", "model.norm.weight"):
            flat = expected[name].reshape(-1)
            for start, stop in itertools.combinations_with_replacement(
                (0, 1, 31, 95, 193, flat.size), 2
            ):
                if start <= stop <= flat.size:
                    np.testing.assert_array_equal(
                        checkpoint.read_flat(name, start, stop), flat[start:stop]
                    )


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma"])
def test_other_decoders_keep_their_rows_and_gemma_its_norms(
    tmp_path: Path, architecture: str
) -> None:
    expected = decoder(tied=architecture == "gemma")
    if architecture == "qwen3":
        expected["model.layers.0.self_attn.q_norm.weight"] = np.ones(SIZE, np.float32)
        expected["model.layers.0.self_attn.k_norm.weight"] = np.ones(SIZE, np.float32)
    if architecture == "qwen2":
        expected["model.layers.0.self_attn.q_proj.bias"] = np.ones(HEADS * SIZE, np.float32)
    write(tmp_path / "m.gguf", architecture, as_gguf(expected, architecture))
    found = load_checkpoint(tmp_path / "m.gguf")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        # (1 + w) - 1 is rounded.
        np.testing.assert_allclose(found[name], tensor, atol=2e-7 if architecture == "gemma" else 0)


def test_gpt2_gets_its_matrices_transposed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    expected = {
        "transformer.wte.weight": rng.normal(size=(WORDS, WIDTH)),
        "transformer.wpe.weight": rng.normal(size=(128, WIDTH)),
        "transformer.h.0.attn.c_attn.weight": rng.normal(size=(WIDTH, 3 * WIDTH)),
        "transformer.h.0.attn.c_attn.bias": rng.normal(size=3 * WIDTH),
        "transformer.h.1.mlp.c_proj.weight": rng.normal(size=(HIDDEN, WIDTH)),
        "transformer.ln_f.weight": rng.normal(size=WIDTH),
    }
    expected = {name: tensor.astype(np.float32) for name, tensor in expected.items()}
    stored = {}
    for name, tensor in expected.items():
        matrix = tensor.ndim == 2 and ".h." in name
        own = gguf_name(gguf.MODEL_ARCH.GPT2, name)
        stored[own] = np.ascontiguousarray(tensor.T) if matrix else tensor
    write(tmp_path / "m.gguf", "gpt2", stored)
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        found = {name: checkpoint.read(name) for name in checkpoint.tensors}
        part = checkpoint.read_flat("transformer.h.0.attn.c_attn.weight", 50, 300)
        assert checkpoint.config is not None
        assert checkpoint.config["architectures"] == ["GPT2LMHeadModel"]
        assert checkpoint.config["n_layer"] == LAYERS
    np.testing.assert_equal(found, expected)
    whole = expected["transformer.h.0.attn.c_attn.weight"]
    np.testing.assert_array_equal(part, whole.reshape(-1)[50:300])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "BF16", "F16"])
def test_quantised_tensors_are_dequantised(tmp_path: Path, kind: str) -> None:
    tensor = np.random.default_rng(0).normal(size=(48, 64)).astype(np.float32)
    number = gguf.GGMLQuantizationType[kind]
    name = "blk.0.ffn_up.weight"
    stored = {**as_gguf(decoder()), name: tensor}
    if kind == "F16":
        stored[name] = tensor.astype(np.float16)
        write(tmp_path / "m.gguf", "llama", stored)
    else:
        write(tmp_path / "m.gguf", "llama", stored, {name: number})
    own = "model.layers.0.mlp.up_proj.weight"
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        info, found = checkpoint.tensors[own], checkpoint.read(own)
        part = checkpoint.read_flat(own, 45, 1001)
    expected = by_hand(tensor, kind)
    np.testing.assert_allclose(found.astype(np.float64), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(part, found.reshape(-1)[45:1001])
    assert info.dtype == {"BF16": "bfloat16", "F16": "float16"}.get(kind, "float32")
    assert info.nbytes == found.nbytes


@pytest.mark.parametrize("kind", [k for k in gguf.GGMLQuantizationType if k.name[0] in "QIMTN"])
def test_every_quantised_type_is_dequantised_or_refused_at_once(tmp_path: Path, kind: Any) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    by_bytes(tmp_path / "m.gguf", [("w", [block, 2], int(kind), 0)], data=2 * size)
    try:
        checkpoint = open_checkpoint(tmp_path / "m.gguf")
    except CheckpointError as error:
        message = str(error)
        assert f"'w': this version of gguf does not dequantise {kind.name}" in message
        return
    with checkpoint:
        assert checkpoint.tensors["w"].shape == (2, block)
        assert np.isfinite(checkpoint.read("w").astype(np.float64)).all()


def by_hand(tensor: np.ndarray, kind: str) -> np.ndarray:
    """What the stored bytes stand for, in float64, from the formats' definitions."""
    if kind == "F16":
        return tensor.astype(np.float16).astype(np.float64)
    packed = gguf.quants.quantize(tensor, gguf.GGMLQuantizationType[kind])
    if kind == "BF16":
        widened = packed.view(np.uint16).astype(np.uint32) << 16
        return widened.view(np.float32).astype(np.float64)
    size, values = {"Q8_0": 34, "Q4_1": 20}[kind], []
    raw = packed.tobytes()
    for block in (raw[at : at + size] for at in range(0, len(raw), size)):
        if kind == "Q8_0":
            (scale,), codes = struct.unpack("<e", block[:2]), np.frombuffer(block[2:], np.int8)
            values.append(scale * codes.astype(np.float64))
        else:
            scale, least = struct.unpack("<ee", block[:4])
            nibbles = np.frombuffer(block[4:], np.uint8)
            codes = np.concatenate([nibbles & 15, nibbles >> 4]).astype(np.float64)
            values.append(scale * codes + least)
    return np.concatenate(values).reshape(tensor.shape)


def test_tables_are_those_of_the_gguf_package() -> None:
    for architecture, rules in gguf_names.RULES.items():
        number = gguf.MODEL_ARCH[architecture.upper()]
        known = gguf.get_tensor_name_map(number, LAYERS)
        for rule in rules:
            name = rule.hugging_face.replace("{i}", "1")
            found = known.get_name(name, try_suffixes=(".weight", ".bias"))
            # The package's map has no query and key norms where a model has none.
            assert found in (rule.gguf.replace("{i}", "1"), None), (architecture, rule)


# Configuration ---------------------------------------------------------------------------------


def test_the_configuration_is_derived_from_the_metadata(llama: Path) -> None:
    with open_checkpoint(llama) as checkpoint:
        assert checkpoint.config == {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": WIDTH,
            "intermediate_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KEY_HEADS,
            "head_dim": SIZE,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "vocab_size": WORDS,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
        }


def test_tied_embeddings_windows_and_scaling_are_seen(tmp_path: Path) -> None:
    scaling = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    scaling["rope.scaling.original_context_length"] = 32
    fields = {"attention.sliding_window": 16, "rope.freq_base": 5e5, **scaling}
    write(tmp_path / "m.gguf", "llama", as_gguf(decoder(tied=True)), **fields)
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        found = checkpoint.config
    assert found is not None
    assert (found["model_type"], found["sliding_window"]) == ("mistral", 16)
    assert (found["tie_word_embeddings"], found["rope_theta"]) == (True, 5e5)
    assert found["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    }


def test_llama_3s_frequencies_become_its_scaling(tmp_path: Path) -> None:
    size, factor, low, high, original = 64, 8.0, 1.0, 4.0, 8192
    factors = []
    for i in range(size // 2):
        wavelength = 2 * np.pi * 5e5 ** (2 * i / size)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    stored = {**as_gguf(decoder()), "rope_freqs.weight": np.float32(factors)}
    fields = {"rope.freq_base": 5e5, "rope.dimension_count": size}
    write(tmp_path / "m.gguf", "llama", stored, **fields)
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        assert checkpoint.config is not None
        assert checkpoint.config["rope_scaling"] == {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
        assert "rope_freqs.weight" not in checkpoint.tensors
    stored["rope_freqs.weight"] = np.float32(factors)[::-1].copy()
    write(tmp_path / "other.gguf", "llama", stored, **fields)
    with pytest.raises(CheckpointError, match=r"rope_freqs.*config\.json cannot express"):
        open_checkpoint(tmp_path / "other.gguf")


def test_an_architecture_without_a_table_keeps_its_own_names(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", "mamba", {"blk.0.ssm_in.weight": np.ones((2, 3), np.float32)})
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        assert list(checkpoint.tensors) == ["blk.0.ssm_in.weight"]
        assert checkpoint.config is None


def test_a_converted_folder_says_what_the_model_is(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "out", dtype="bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["torch_dtype"]) == ("llama", "bfloat16")
    # Two tokens and no merges are no tokenizer.
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    found = load_checkpoint(tmp_path / "out")
    assert set(found) == set(decoder())


def test_gguf_files_are_models_and_sources_of_a_merge(llama: Path, tmp_path: Path) -> None:
    write(tmp_path / "other.gguf", "llama", as_gguf(decoder(1)))
    recipe = f"merge_method: linear\nmodels: [{{model: {llama}}}, {{model: {tmp_path / 'other.gguf'}}}]\n"
    recipe += "parameters: {weight: 1.0}\n"
    merged = run(make_plan(parse(recipe), out=tmp_path / "merged"))
    apply_fn, params, config = load_model(merged)
    assert config.family == "llama"
    first, second, found = decoder(0), decoder(1), load_checkpoint(merged)
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, (first[name] + second[name]) / 2, atol=1e-6)
    assert apply_fn(params, np.arange(4)[None]).shape == (1, 4, WORDS)
    assert load_model(llama)[2].model == config.model


# Parts, folders --------------------------------------------------------------------------------


def test_the_parts_of_a_split_file_are_read_together(tmp_path: Path) -> None:
    expected = decoder()
    stored = list(as_gguf(expected).items())
    for number, part in enumerate((stored[:7], stored[7:]), start=1):
        write(tmp_path / f"m-0000{number}-of-00002.gguf", "llama", dict(part))
    np.testing.assert_equal(load_checkpoint(tmp_path), expected)
    np.testing.assert_equal(load_checkpoint(tmp_path / "m-00002-of-00002.gguf"), expected)
    os.unlink(tmp_path / "m-00001-of-00002.gguf")
    with pytest.raises(CheckpointError, match=r"part m-00001-of-00002\.gguf is missing"):
        open_checkpoint(tmp_path / "m-00002-of-00002.gguf")


def test_a_folder_with_several_models_asks_which(llama: Path) -> None:
    os.link(llama, llama.parent / "other.gguf")
    with pytest.raises(CheckpointError, match=r"several GGUF files, .*: llama\.gguf, other\.gguf"):
        open_checkpoint(llama.parent)
    os.rename(llama, llama.parent / "0123abcd")
    assert len(load_checkpoint(llama.parent / "0123abcd")) == len(decoder())


# Broken and hostile files ----------------------------------------------------------------------


def test_a_file_cut_anywhere_is_an_error(llama: Path) -> None:
    whole = llama.read_bytes()
    for size in [*range(0, 600, 7), len(whole) // 2, len(whole) - 64]:
        llama.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"llama\.gguf: "):
            open_checkpoint(llama)


def test_any_byte_of_the_header_may_lie(llama: Path) -> None:
    """Whatever a byte says, the file opens or is refused; nothing else."""
    whole = llama.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.choice(1500, 300, replace=False):
        for value in (0, 255):
            llama.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            with contextlib.suppress(CheckpointError):
                open_checkpoint(llama).close()


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [
        (0, b"FUGG", r"expected a GGUF file that starts with b'GGUF', found b'FUGG'"),
        (4, struct.pack("<I", 1), r"expected GGUF version 2 or 3, found 1"),
        (4, struct.pack(">I", 3), r"the other byte order"),
        (8, struct.pack("<Q", 2**40), r"expected 1099511627776 tensors"),
        (16, struct.pack("<Q", 2**63), r"expected 9223372036854775808 metadata entries"),
        (24, struct.pack("<Q", 2**50), r"expected a metadata key at byte 32, at least 11258999"),
    ],
)
def test_impossible_headers_are_refused_before_anything_is_read(
    llama: Path, at: int, new: bytes, message: str
) -> None:
    whole = llama.read_bytes()
    llama.write_bytes(whole[:at] + new + whole[at + len(new) :])
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(llama)


def by_bytes(path: Path, tensors: list[tuple[str, list[int], int, int]], data: int = 64) -> None:
    """A GGUF file of float32 tensors, written field by field."""
    text = lambda value: struct.pack("<Q", len(value)) + value  # noqa: E731
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 1)
    head += text(b"general.architecture") + struct.pack("<I", 8) + text(b"other")
    for name, shape, kind, offset in tensors:
        head += text(name.encode()) + struct.pack("<I", len(shape))
        head += b"".join(struct.pack("<Q", size) for size in shape)
        head += struct.pack("<IQ", kind, offset)
    path.write_bytes(head + bytes(-len(head) % 32 + data))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("w", [4], 0, 128)], r"'w': expected its bytes \d+:\d+ within the \d+ bytes"),
        ([("w", [4], 0, 7)], r"'w': expected an offset that 32 divides, found 7"),
        ([("w", [2**40, 2**40], 0, 0)], r"'w': F32 of shape .* is no possible array"),
        ([("w", [4], 99, 0)], r"'w': no such storage type: 99"),
        ([("w", [33], 8, 0)], r"'w': expected rows of whole blocks of 32 elements \(Q8_0\)"),
        ([("w", [1] * 9, 0, 0)], r"'w': expected at most 8 dimensions, found 9"),
        ([("w", [4], 0, 0), ("w", [4], 0, 32)], r"'w': the header names it twice"),
        ([("v", [12], 0, 0), ("w", [4], 0, 32)], r"'w': its bytes .* overlap those of 'v'"),
    ],
)
def test_tensors_that_cannot_be_are_refused(
    tmp_path: Path, tensors: list[tuple[str, list[int], int, int]], message: str
) -> None:
    by_bytes(tmp_path / "m.gguf", tensors)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "m.gguf")


def test_tensors_of_no_llama_are_listed(tmp_path: Path) -> None:
    stored = {**as_gguf(decoder()), "blk.0.ffn_gate_exps.weight": np.ones((2, 32), np.float32)}
    write(tmp_path / "m.gguf", "llama", stored)
    message = r"1 tensors that the architecture 'llama' does not have: blk\.0\.ffn_gate_exps"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "m.gguf")


def test_missing_metadata_are_named(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", "llama", as_gguf(decoder()), drop=("block_count",))
    with pytest.raises(CheckpointError, match=r"no metadata 'llama\.block_count'"):
        open_checkpoint(tmp_path / "m.gguf")
    write(tmp_path / "n.gguf", "llama", as_gguf(decoder()), **{"attention.head_count": 5})
    with pytest.raises(CheckpointError, match=r"'blk\.0\.attn_q\.weight': expected rows of 5 head"):
        open_checkpoint(tmp_path / "n.gguf")


def test_a_key_is_refused_and_a_closed_file_says_so(llama: Path) -> None:
    with pytest.raises(CheckpointError, match="gguf files are flat"):
        open_checkpoint(llama, key="model")
    checkpoint = open_checkpoint(llama)
    checkpoint.close()
    with pytest.raises(CheckpointError, match="the checkpoint is closed"):
        checkpoint.read("model.norm.weight")
