"""Small models for the alignment tests, in the layout of the reference problems (PyTorch's names and axes)."""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def mlp(params: Any, x: jax.Array) -> jax.Array:
    for name in ("fc1", "fc2", "fc3"):
        x = jax.nn.relu(x @ params[f"{name}.weight"].T)
    return x @ params["fc4.weight"].T


def residual_network(params: Any, x: jax.Array) -> jax.Array:
    """A CIFAR ResNet with BatchNorm in evaluation mode; blocks and strides follow from the names."""

    def convolve(name: str, x: jax.Array, stride: int = 1) -> jax.Array:
        kernel = params[f"{name}.weight"]
        pad = (kernel.shape[2] - 1) // 2
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            ((pad, pad),) * 2,
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
        )

    def normalise(name: str, x: jax.Array) -> jax.Array:
        mean, var, weight, bias = (
            params[f"{name}.{kind}"][None, :, None, None]
            for kind in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / jnp.sqrt(var + 1e-5) * weight + bias

    x = jax.nn.relu(normalise("bn1", convolve("conv1", x)))
    for block in dict.fromkeys(name[:8] for name in params if name.startswith("layer")):
        stride = 2 if block[5] > "1" and block[7] == "0" else 1
        h = jax.nn.relu(normalise(f"{block}.bn1", convolve(f"{block}.conv1", x, stride)))
        h = normalise(f"{block}.bn2", convolve(f"{block}.conv2", h))
        if f"{block}.shortcut.0.weight" in params:
            x = normalise(f"{block}.shortcut.1", convolve(f"{block}.shortcut.0", x, stride))
        x = jax.nn.relu(h + x)
    x = jnp.mean(x, (2, 3))
    return x @ params["linear.weight"].T + params["linear.bias"][None]


def attention(params: Any, x: jax.Array) -> jax.Array:
    """A block of self-attention with two heads and a mean over tokens."""
    heads = 2
    h = x @ params["in"]
    q, k, v = (
        (h @ params[name]).reshape(*h.shape[:2], heads, -1) for name in ("query", "key", "value")
    )
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k), -1)
    h = h + jnp.einsum("bhts,bshd->bthd", weights, v).reshape(*h.shape[:2], -1) @ params["out"]
    return jnp.mean(h, 1) @ params["head"]


def grouped_query_attention(params: Any, x: jax.Array) -> jax.Array:
    """A block of self-attention in which two heads of queries share each of two heads of keys and values."""
    h = x @ params["in"]
    q = (h @ params["query"]).reshape(*h.shape[:2], 2, 2, 4)
    k, v = ((h @ params[name]).reshape(*h.shape[:2], 2, -1) for name in ("key", "value"))
    weights = jax.nn.softmax(jnp.einsum("btkgd,bskd->bkgts", q, k), -1)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(*h.shape[:2], -1)
    return jnp.mean(h + out @ params["out"], 1) @ params["head"]


def group_norm_network(params: Any, x: jax.Array) -> jax.Array:
    """A hidden layer of three groups of four units, normalised group by group."""
    h = (x @ params["fc1"]).reshape(-1, 3, 4)
    h = h - jnp.mean(h, -1, keepdims=True)
    h = (h / jnp.sqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-5)).reshape(-1, 12)
    return jnp.tanh(h * params["scale"][None] + params["bias"][None]) @ params["fc2"]


def scanned_network(params: Any, x: jax.Array) -> jax.Array:
    """A residual stream through three stacked layers."""

    def layer(h: jax.Array, p: Any) -> tuple[jax.Array, None]:
        return h + jnp.tanh(h @ p["up"]) @ p["down"], None

    return jax.lax.scan(layer, x @ params["in"], params["layers"])[0] @ params["head"]


def vision_transformer(params: Any, x: jax.Array) -> jax.Array:
    """A ViT with four heads, fused queries, keys and values, and a class token."""
    heads = 4

    def along(vector: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(vector, x.shape)

    def linear(name: str, x: jax.Array) -> jax.Array:
        x = x @ params[f"{name}.weight"].T
        return x + along(params[f"{name}.bias"], x)

    def normalise(name: str, x: jax.Array) -> jax.Array:
        x = x - jnp.mean(x, -1, keepdims=True)
        x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)
        return x * along(params[f"{name}.weight"], x) + along(params[f"{name}.bias"], x)

    kernel = params["patch_embed.proj.weight"]
    x = jax.lax.conv_general_dilated(
        x, kernel, kernel.shape[2:], "VALID", dimension_numbers=("NCHW", "OIHW", "NHWC")
    )
    x = x.reshape(len(x), -1, x.shape[-1])
    x = x + along(params["patch_embed.proj.bias"], x)
    token = jnp.broadcast_to(params["cls_token"], (len(x), 1, x.shape[-1]))
    x = jnp.concatenate([token, x], 1)
    x = x + along(params["pos_embed"], x)
    for block in dict.fromkeys(name[:8] for name in params if name.startswith("blocks")):
        h = linear(f"{block}.attn.qkv", normalise(f"{block}.norm1", x))
        q, k, v = jnp.moveaxis(h.reshape(*h.shape[:2], 3, heads, -1), 2, 0)
        weights = jnp.einsum("bthd,bshd->bhts", q, k) / jnp.sqrt(q.shape[-1])
        h = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(weights, -1), v)
        x = x + linear(f"{block}.attn.proj", h.reshape(x.shape))
        h = linear(f"{block}.mlp.fc1", normalise(f"{block}.norm2", x))
        x = x + linear(f"{block}.mlp.fc2", jax.nn.gelu(h, approximate=False))
    return linear("head", normalise("norm", x)[:, 0])


def draw_mlp(seed: int, widths: tuple[int, ...] = (5, 12, 12, 12, 4)) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        f"fc{i + 1}.weight": jnp.asarray(rng.standard_normal((m, n)) / np.sqrt(n), jnp.float32)
        for i, (n, m) in enumerate(itertools.pairwise(widths))
    }


def draw_grouped_query_attention(seed: int) -> dict[str, jax.Array]:
    shapes = {"in": (3, 6), "query": (6, 16), "key": (6, 8), "value": (6, 6), "out": (12, 6)}
    return _draw(seed, {**shapes, "head": (6, 2)})


def draw_group_norm_network(seed: int) -> dict[str, jax.Array]:
    return _draw(seed, {"fc1": (5, 12), "scale": (12,), "bias": (12,), "fc2": (12, 3)})


def draw_scanned_network(seed: int) -> dict[str, Any]:
    layers = _draw(seed, {"up": (3, 6, 8), "down": (3, 8, 6)})
    return {"layers": layers, **_draw(seed + 1, {"in": (5, 6), "head": (6, 2)})}


def _draw(seed: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()
    }


def draw_attention(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = {
        "in": (3, 6),
        "query": (6, 8),
        "key": (6, 8),
        "value": (6, 10),
        "out": (10, 6),
        "head": (6, 2),
    }
    return {
        name: jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), jnp.float32)
        for name, shape in shapes.items()
    }
