"""The reference problems: what MuDSC's and Git Re-Basin's own code gave, beside what jaxmerge gives."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from report import Table

import jaxmerge as jm
from alignment_sections import Options, verdict

SPACES = {
    "act_perm": ("activation", jm.align.activation_space()),
    "wgt_perm": ("weight", jm.align.weight_space()),
    "dual_perm_a0.3": ("dual .3", jm.align.dual_space(0.3)),
    "dual_perm_a0.5": ("dual .5", jm.align.dual_space(0.5)),
    "dual_perm_a0.9": ("dual .9", jm.align.dual_space(0.9)),
}
SIMILARITY_LIMIT, MERGED_LIMIT = 1e-6, 1e-8
EPSILON = 5e-6
"""By how much the official code makes each axis that a tensor produces smaller."""


def run(options: Options) -> Iterator[Table]:
    table = Table(
        "Reference problems",
        {
            "problem": "",
            "space": "",
            "weights differ by": ".0e",
            "activations differ by": ".0e",
            "permutations": "",
            "merged differ by": ".0e",
            "planted units found": "",
            "holds": "",
        },
        [
            "Inputs and outputs of MuDSC's and Git Re-Basin's own code beside jaxmerge in float64, same order of",
            f"visits. Limits: similarities {SIMILARITY_LIMIT:.0e} (largest difference), permutations equal, merged",
            f"weights {MERGED_LIMIT:.0e} of the tensor's largest entry (the official epsilon, factor 1 - {EPSILON:.0e}",
            "per produced axis, aside). Planted units that are missed are missed by the official code as well where",
            "the permutations are equal.",
        ],
    )
    table.start()
    with jax.enable_x64(True):
        for name, function in PROBLEMS.items():
            path = options.reference / f"{name}.npz"
            if path.is_file():
                for cells in _official(np.load(path), function):
                    table.add(problem=name, **cells)
            else:
                table.add(problem=name, space="not there")
        path = options.reference / "rebasin_mlp_planted.npz"
        if path.is_file():
            table.add(problem=path.stem, **_rebasin(np.load(path)))
        else:
            table.add(problem=path.stem, space="not there")
    yield table


def _official(file: Any, function: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    names = [key[6:] for key in file.files if key.startswith("in/m0/")]
    a, b = ({n: jnp.asarray(file[f"in/m{i}/{n}"]) for n in names} for i in (0, 1))
    batches = [jnp.asarray(x) for x in file["X"]]
    spec = jm.align.symmetry(function, a, batches[0])
    nodes = {
        group: spec.binding(uses[0][1]).axes[uses[0][0]].nodes()[0]
        for group, uses in json.loads(str(file["spec_json"])).items()
    }
    weights = jm.align.weight_similarity(spec, a, b)
    data = jm.align.activation_similarity(spec, function, a, b, batches)
    far = {"wsim_init": 0.0, "asim": 0.0}
    for group, node in nodes.items():
        n = spec.size(node)
        for kind, mine in (("wsim_init", weights), ("asim", data)):
            official = file[f"{kind}/{group}"][:n, n:]
            far[kind] = max(far[kind], float(np.max(np.abs(np.asarray(mine[node]) - official))))
    groups = list(nodes)
    order = [[nodes[groups[i]] for i in row] for row in file["visit_order"]]
    for mode, (space, compared) in SPACES.items():
        found, _ = jm.align.match(spec, a, b, compared, similarities=data, order=order)
        equal = all(
            np.array_equal(found[node], file[f"{mode}/perm/{group}/m1"])
            for group, node in nodes.items()
        )
        merged = _merged_difference(spec, found, a, b, file, mode)
        units = recovered = 0
        for group, node in nodes.items():
            answer = np.argsort(file[f"planted/m1/{group}"])
            units += len(answer)
            recovered += int(np.sum(np.asarray(found[node]) == answer))
        holds = max(far.values()) <= SIMILARITY_LIMIT and equal and merged <= MERGED_LIMIT
        yield {
            "space": space,
            "weights differ by": far["wsim_init"],
            "activations differ by": far["asim"],
            "permutations": "equal" if equal else "DIFFER",
            "merged differ by": merged,
            "planted units found": f"{recovered}/{units}",
            "holds": verdict(holds, f"{mode}, see its row"),
        }


def _merged_difference(
    spec: jm.align.PermutationSpec,
    found: Mapping[str, Any],
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    file: Any,
    mode: str,
) -> float:
    aligned = jm.align.permute(spec, found, b)
    largest = 0.0
    for path, binding in spec.leaves:
        roles = [axis.role for _, axis in binding.moving()]
        if "stat" in roles:
            continue
        factor = (1 - EPSILON) ** sum(role != "in" for role in roles)
        merged = np.asarray(a[path] + aligned[path]) / 2 * factor
        official = file[f"{mode}/merged/{path}"]
        largest = max(largest, float(np.max(np.abs(merged - official)) / np.max(np.abs(official))))
    return largest


def _rebasin(file: Any) -> dict[str, Any]:
    a, b = ({k[2:]: jnp.asarray(file[k]) for k in file.files if k[:2] == f"{m}/"} for m in "ab")
    spec = jm.align.symmetry(_flax_mlp, a, jnp.ones((1, 20)))
    names = [str(name) for name in file["perm_names"]]
    order = [[f"Dense_{names[i][2:]}" for i in row] for row in file["visit_order"]]
    found, _ = jm.align.match(spec, a, b, jm.align.weight_space("product"), order=order)
    equal = all(np.array_equal(found[f"Dense_{name[2:]}"], file[f"perm/{name}"]) for name in names)
    return {
        "space": "weight products",
        "permutations": "equal" if equal else "DIFFER",
        "holds": verdict(equal, "permutations differ"),
    }


def _along_last(vector: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(vector, x.shape)


def _flax_mlp(params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    for i in range(4):
        x = x @ params[f"Dense_{i}/kernel"]
        x = x + _along_last(params[f"Dense_{i}/bias"], x)
        x = jax.nn.relu(x) if i < 3 else x
    return x


def _mlp(params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    for name in ("fc1", "fc2", "fc3"):
        x = jax.nn.relu(x @ params[f"{name}.weight"].T)
    return x @ params["fc4.weight"].T


def _residual_network(params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """A CIFAR ResNet in evaluation mode; blocks and strides follow from the names."""

    def convolve(name: str, x: jax.Array, stride: int = 1) -> jax.Array:
        kernel = params[f"{name}.weight"]
        pad = (kernel.shape[2] - 1) // 2
        layout = ("NCHW", "OIHW", "NCHW")
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), ((pad, pad),) * 2, dimension_numbers=layout
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
    x = jnp.mean(x, (2, 3)) @ params["linear.weight"].T
    return x + _along_last(params["linear.bias"], x)


PROBLEMS = {"mlp_planted": _mlp, "resnet20_planted": _residual_network}
