"""The reference problems: similarities, permutations and merged weights of MuDSC's and Git Re-Basin's own code."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from align.models import mlp, residual_network, vision_transformer

import jaxmerge as jm

FOLDER = Path(__file__).parents[3] / "shared" / "golden"
MODES = {
    "act_perm": jm.align.activation_space(),
    "wgt_perm": jm.align.weight_space(),
    "dual_perm_a0.3": jm.align.dual_space(0.3),
    "dual_perm_a0.5": jm.align.dual_space(0.5),
    "dual_perm_a0.9": jm.align.dual_space(0.9),
}
PROBLEMS = {"mlp_planted": mlp, "resnet20_planted": residual_network}

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"the reference problems are not there: {FOLDER.name}"
)


class Problem:
    def __init__(self, name: str) -> None:
        self.file = np.load(FOLDER / f"{name}.npz")
        self.function = PROBLEMS[name]
        names = [key[6:] for key in self.file.files if key.startswith("in/m0/")]
        self.a, self.b = (
            {n: jnp.asarray(self.file[f"in/m{i}/{n}"]) for n in names} for i in (0, 1)
        )
        self.batches = [jnp.asarray(x) for x in self.file["X"]]
        self.spec = jm.align.symmetry(self.function, self.a, self.batches[0])
        groups = json.loads(str(self.file["spec_json"]))
        self.nodes = {
            group: self.spec.binding(uses[0][1]).axes[uses[0][0]].nodes()[0]  # type: ignore[union-attr]
            for group, uses in groups.items()
        }


@pytest.fixture(scope="module", params=PROBLEMS)
def problem(request: Any) -> Iterator[Problem]:
    with jax.enable_x64(True):
        yield Problem(request.param)


def test_similarities(problem: Problem) -> None:
    weights = jm.align.weight_similarity(problem.spec, problem.a, problem.b)
    data = jm.align.activation_similarity(
        problem.spec, problem.function, problem.a, problem.b, problem.batches
    )
    for group, node in problem.nodes.items():
        n = problem.spec.node(node).size
        expected = problem.file[f"wsim_init/{group}"][:n, n:]
        np.testing.assert_allclose(weights[node], expected, atol=1e-9)
        np.testing.assert_allclose(data[node], problem.file[f"asim/{group}"][:n, n:], atol=1e-9)


def test_permutations_and_merged_weights(problem: Problem) -> None:
    groups = list(problem.nodes)
    order = [[problem.nodes[groups[i]] for i in row] for row in problem.file["visit_order"]]
    data = jm.align.activation_similarity(
        problem.spec, problem.function, problem.a, problem.b, problem.batches
    )
    for mode, space in MODES.items():
        found, _ = jm.align.match(
            problem.spec, problem.a, problem.b, space, similarities=data, order=order
        )
        for group, node in problem.nodes.items():
            assert found[node].tolist() == problem.file[f"{mode}/perm/{group}/m1"].tolist()
        aligned = jm.align.permute(problem.spec, found, problem.b)
        for path, binding in problem.spec.leaves:
            if any(axis.role == "stat" for _, axis in binding.moving()):
                continue
            # The official code's epsilon: a factor for each axis that the tensor produces.
            factor = (1 - 5e-6) ** sum(axis.role != "in" for _, axis in binding.moving())
            merged = (problem.a[path] + aligned[path]) / 2 * factor
            np.testing.assert_allclose(
                merged, problem.file[f"{mode}/merged/{path}"], rtol=1e-8, atol=1e-9
            )


ZIPS = {
    "act_zip": jm.align.activation_space(),
    "wgt_zip": jm.align.weight_space(),
    "dual_zip_a0.5": jm.align.dual_space(0.5),
}


def test_zips(problem: Problem) -> None:
    groups = list(problem.nodes)
    order = [[problem.nodes[groups[i]] for i in row] for row in problem.file["visit_order"]]
    for mode, space in ZIPS.items():
        merged, info = jm.align.zipit(
            problem.spec,
            [problem.a, problem.b],
            space,
            x=problem.batches,
            apply_fn=problem.function,
            order=order,
        )
        # The official code's epsilon: a factor for each unit that is produced, by the size of its cluster.
        factors = {}
        for group, node in problem.nodes.items():
            merge, unmerge = (
                np.concatenate(m) for m in jm.align.merge_matrices(info.clusters[node])
            )
            np.testing.assert_array_equal(unmerge, problem.file[f"{mode}/unmerge/{group}"])
            sizes = unmerge.sum(0)
            factors[node] = sizes / (sizes + 1e-5)
            expected = problem.file[f"{mode}/merge_scaled/{group}"]
            np.testing.assert_allclose(merge * factors[node], expected, rtol=1e-12)
        for path, binding in problem.spec.leaves:
            expected = problem.file[f"{mode}/merged/{path}"]
            if "running" in path:
                continue
            for i, axis in binding.moving():
                if axis.role != "in":
                    shape = [-1 if j == i else 1 for j in range(expected.ndim)]
                    expected = expected / factors[axis.nodes()[0]].reshape(shape)
            np.testing.assert_allclose(merged[path], expected, rtol=1e-8, atol=1e-10)


def test_weight_matching_of_git_rebasin() -> None:
    file = np.load(FOLDER / "rebasin_mlp_planted.npz")

    def function(p: Any, x: jax.Array) -> jax.Array:
        for i in range(4):
            bias = p[f"Dense_{i}/bias"]
            x = x @ p[f"Dense_{i}/kernel"] + jnp.broadcast_to(bias, (len(x), len(bias)))
            x = jax.nn.relu(x) if i < 3 else x
        return x

    with jax.enable_x64(True):
        a, b = (
            {k[2:]: jnp.asarray(file[k]) for k in file.files if k.startswith(f"{m}/")} for m in "ab"
        )
        spec = jm.align.symmetry(function, a, jnp.ones((1, 20)))
        names = [str(name) for name in file["perm_names"]]
        nodes = {name: f"Dense_{name[2:]}" for name in names}
        order = [[nodes[names[i]] for i in row] for row in file["visit_order"]]
        found, _ = jm.align.match(spec, a, b, jm.align.weight_space("product"), order=order)
    for name, node in nodes.items():
        assert found[node].tolist() == file[f"perm/{name}"].tolist()


def test_vision_transformer_with_heads_matched_apart_as_in_the_official_code() -> None:
    file = np.load(FOLDER / "vit_planted.npz")
    with jax.enable_x64(True):
        a, b = (
            {k[6:]: jnp.asarray(file[k]) for k in file.files if k.startswith(f"in/m{i}/")}
            for i in (0, 1)
        )
        batches = [jnp.asarray(x) for x in file["X"]]
        whole = jm.align.symmetry(vision_transformer, a, batches[0])
        # In the file's order: the stream; of both blocks queries and keys, values, the hidden units.
        inner = ("attn/qkv:1", "attn/qkv:1#2", "mlp/fc1")
        nodes = ["blocks/0/attn/proj", *(f"blocks/{i}/{name}" for i in (0, 1) for name in inner)]
        sizes = [int(np.prod(whole.shape(node))) for node in nodes]
        weights = jm.align.weight_similarity(whole, a, b)
        data = jm.align.activation_similarity(whole, vision_transformer, a, b, batches)
        for group, (node, n) in enumerate(zip(nodes, sizes, strict=True)):
            np.testing.assert_allclose(weights[node], file[f"wsim_init/{group}"][:n, n:], atol=1e-9)
            official = file[f"asim/{group}"][:n, n:]
            if node.endswith("qkv:1"):
                # The official code looks at keys alone: queries do not enter.
                data[node] = jnp.asarray(official)
            else:
                np.testing.assert_allclose(data[node], official, atol=1e-9)
        split = jm.align.split_trees(whole)
        roots = [(*split.node(node).parents, node)[0] for node in nodes]
        order = [[roots[i] for i in row] for row in file["visit_order"]]
        for mode, space in MODES.items():
            found, _ = jm.align.match(split, a, b, space, similarities=data, order=order)
            for group, node in enumerate(nodes):
                p = found[node]
                if split.node(node).parents:
                    p = (found[roots[group]][:, None] * p.shape[-1] + p).ravel()
                assert p.tolist() == file[f"{mode}/perm/{group}/m1"].tolist()
