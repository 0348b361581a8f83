"""Quantised checkpoints are refused by name; plain ones pass."""

import pytest

from jaxmerge.converters import CheckpointError, TensorInfo, refuse_quantised

QUANTISED = {
    "bitsandbytes int8": ({"fc.weight": "int8", "fc.SCB": "float32"}, "bitsandbytes", "fc.SCB"),
    "bitsandbytes nf4": (
        {"fc.weight": "uint8", "fc.weight.absmax": "float32"},
        "bitsandbytes",
        "fc.weight.absmax",
    ),
    "bitsandbytes state": (
        {"fc.weight": "uint8", "fc.weight.quant_state.bitsandbytes__nf4": "uint8"},
        "bitsandbytes",
        "fc.weight.quant_state.bitsandbytes__nf4",
    ),
    "bitsandbytes map": (
        {"up": "uint8", "up.quant_map": "float32"},
        "bitsandbytes",
        "up.quant_map",
    ),
    "GPTQ": (
        {"fc.qweight": "int32", "fc.qzeros": "int32", "fc.g_idx": "int32"},
        "GPTQ",
        "fc.qweight",
    ),
    "AWQ": ({"fc.qweight": "int32", "fc.scales": "float16"}, "AWQ", "fc.qweight"),
    "HQQ": ({"fc.W_q": "uint8"}, "HQQ", "fc.W_q"),
    "compressed-tensors": ({"fc.weight_packed": "int32"}, "compressed-tensors", "weight_packed"),
    "MXFP4": ({"e.up_blocks": "uint8", "e.up_scales": "uint8"}, "MXFP4", "e.up_blocks"),
    "fp8": (
        {"fc.weight": "float8_e4m3fn", "fc.weight_scale": "float32"},
        "float8 weights with scales",
        "fc.weight_scale",
    ),
    "fp8 blocks": (
        {"fc.weight": "float8_e4m3fn", "fc.weight_scale_inv": "float32"},
        "float8 weights with scales",
        "fc.weight_scale_inv",
    ),
    "int8": (
        {"fc.weight": "int8", "fc.weight_scale": "float32"},
        "int8 with scales",
        "weight_scal",
    ),
    "scaled fp8": ({"scaled_fp8": "float8_e4m3fn"}, "float8 weights with scales", "scaled_fp8"),
}


def infos(names):
    return {name: TensorInfo.of(name, (2,), dtype) for name, dtype in names.items()}


@pytest.mark.parametrize("case", QUANTISED)
def test_each_scheme_is_named_with_the_tensor_and_the_way_out(case):
    names, scheme, tensor = QUANTISED[case]
    with pytest.raises(CheckpointError) as caught:
        refuse_quantised(infos(names), None, where="models/a")
    message = str(caught.value)
    assert message.startswith("models/a: quantised (")
    assert scheme in message
    assert tensor in message
    assert "quantise after the merge" in message


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"quantization_config": {"load_in_4bit": True}}, "unknown method"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ],
)
def test_the_config_is_believed(config, method):
    with pytest.raises(CheckpointError, match=rf"quantised \({method}, by quantization_config"):
        refuse_quantised(infos({"fc.weight": "float16"}), config)


def test_plain_checkpoints_pass():
    names = {
        "fc.weight": "float32",
        "fc.weight_scale": "float32",
        "cast.weight": "float8_e4m3fn",
        "bn.num_batches_tracked": "int64",
        "scale": "float32",
        "observer.absmax": "float32",
        "blocks.0.w": "float32",
        "up_blocks": "float32",
    }
    refuse_quantised(infos(names), {"quantization_config": None, "vision_config": {}})
    refuse_quantised(infos(names).values())
