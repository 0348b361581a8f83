"""What merging loses and alignment gains: networks of five classes each, merged into one of ten."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from report import Table

import jaxmerge as jm
from alignment_sections import Options, interval
from alignment_sections.fashion import Images, load
from alignment_sections.networks import CLASSES, class_embeddings, network, train

ALPHAS = tuple(round(0.1 * i, 1) for i in range(1, 10))
VALIDATION = 5000
MATCHED = 1000
HALF = "dual, alpha .5"
CHOSEN = "dual, alpha chosen"


class Accuracy(NamedTuple):
    """Percent of images of all classes right among all, and of each task's among its own."""

    joint: float
    first: float
    second: float


class Pair(NamedTuple):
    """What one seed gives.

    Attributes:
      accuracies: on the test images by method.
      over_alpha: joint accuracy on the test images for the alphas 0, `ALPHAS`, 1.
      alpha: the chosen one.
      scores: mean similarity of matched units by (permutation of, scored in).
      apart: percent of units that the two single spaces match differently.
    """

    accuracies: dict[str, Accuracy]
    over_alpha: list[float]
    alpha: float
    scores: dict[tuple[str, str], float]
    apart: float


def run(options: Options) -> Iterator[Table]:
    train_images, test = load(options.data)
    pairs = [_pair(options, options.seed + i, train_images, test) for i in range(options.seeds)]
    where = (
        f"{options.network}, {options.seeds} pairs; each network trained for {options.epochs} epochs on"
        f" {options.examples} images of 28 x 28 of its five random classes of Fashion-MNIST"
    )
    yield _accuracies(pairs, where)
    yield _differences(pairs)
    yield _disagreement(pairs)
    if options.plot is not None:
        _draw(options, pairs)


def _pair(options: Options, seed: int, train_images: Images, test: Images) -> Pair:
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(train_images.labels))
    held, rest = order[:VALIDATION], order[VALIDATION:]
    classes = rng.permutation(CLASSES)
    tasks = (classes[:5], classes[5:])
    embeddings = class_embeddings(seed)
    model = network(options.network)

    networks = []
    for i, task in enumerate(tasks):
        mine = rest[np.isin(train_images.labels[rest], task)][: options.examples]
        position = np.zeros(CLASSES, np.int32)
        position[task] = np.arange(len(task))
        networks.append(
            train(
                model,
                options.epochs,
                jax.random.fold_in(jax.random.key(seed), i),
                jnp.asarray(train_images.images[mine]),
                jnp.asarray(position[train_images.labels[mine]]),
                embeddings[task],
            )
        )
    a, b = networks
    x = jnp.asarray(train_images.images[rest[:MATCHED]])
    spec = jm.align.symmetry(model.apply, a, x)
    data = jm.align.activation_similarity(spec, model.apply, a, b, [x])
    weight, _ = jm.align.match(spec, a, b, jm.align.weight_space())
    activation, _ = jm.align.match(spec, a, b, jm.align.activation_space(), similarities=data)
    half, _ = jm.align.match(spec, a, b, jm.align.dual_space(0.5), similarities=data)
    path, _ = jm.align.match_path(spec, a, b, jnp.asarray(ALPHAS), similarities=data)
    along = [{name: p[i] for name, p in path.items()} for i in range(len(ALPHAS))]

    apply = jax.jit(model.apply)

    def merged(permutations: Mapping[str, Any]) -> Any:
        aligned = jm.align.permute(spec, permutations, b)
        return jax.tree.map(lambda one, other: (one + other) / 2, a, aligned)

    def outputs(params: Any, images: np.ndarray) -> np.ndarray:
        parts = [apply(params, jnp.asarray(part)) for part in np.split(images, len(images) // 1000)]
        return np.asarray(jnp.concatenate(parts) @ embeddings.T)

    def joint(params: Any, of: Images) -> float:
        return 100 * float(np.mean(np.argmax(outputs(params, of.images), 1) == of.labels))

    validation = Images(train_images.images[held], train_images.labels[held])
    chosen = int(np.argmax([joint(merged(one), validation) for one in along]))
    logits = {
        "average": outputs(merged({}), test.images),
        "weight": outputs(merged(weight), test.images),
        "activation": outputs(merged(activation), test.images),
        HALF: outputs(merged(half), test.images),
        CHOSEN: outputs(merged(along[chosen]), test.images),
        "ensemble": outputs(a, test.images) + outputs(b, test.images),
    }
    accuracies = {name: _accuracy(found, test.labels, tasks) for name, found in logits.items()}
    own = [
        _accuracy(outputs(one, test.images), test.labels, tasks)[1 + i]
        for i, one in enumerate((a, b))
    ]
    accuracies["each on its own task"] = Accuracy(float("nan"), *own)
    return Pair(
        accuracies,
        [joint(merged(one), test) for one in (activation, *along, weight)],
        ALPHAS[chosen],
        _scores(spec, a, b, data, {"weights": weight, "activations": activation, "both": half}),
        100
        * float(
            np.mean(
                np.concatenate(
                    [np.ravel(np.asarray(weight[k]) != np.asarray(activation[k])) for k in weight]
                )
            )
        ),
    )


def _accuracy(logits: np.ndarray, labels: np.ndarray, tasks: tuple[np.ndarray, ...]) -> Accuracy:
    found = [np.mean(np.argmax(logits, 1) == labels)]
    for task in tasks:
        mine = np.isin(labels, task)
        found.append(np.mean(task[np.argmax(logits[mine][:, task], 1)] == labels[mine]))
    return Accuracy(*(100 * float(value) for value in found))


def _scores(
    spec: jm.align.PermutationSpec,
    a: Any,
    b: Any,
    data: Mapping[str, jax.Array],
    permutations: Mapping[str, Any],
) -> dict[tuple[str, str], float]:
    """The mean over roots of trees of nodes of the mean similarity of matched units, in both spaces."""
    roots = [node.name for node in spec.free() if not node.parents]
    scores = {}
    for name, found in permutations.items():
        for space, similar in (
            ("weights", jm.align.weight_similarity(spec, a, b, found)),
            ("activations", data),
        ):
            values = [
                np.mean(np.asarray(similar[root])[np.arange(spec.size(root)), found[root]])
                for root in roots
                if root in similar
            ]
            scores[name, space] = float(np.mean(values))
    return scores


def _accuracies(pairs: list[Pair], where: str) -> Table:
    table = Table(
        "Accuracy of merged networks",
        {"method": "", "joint %": "", "each task among its own classes %": ""},
        [
            f"{where}. {VALIDATION} other training images choose alpha among {ALPHAS[0]} to {ALPHAS[-1]}"
            f" (chosen: {', '.join(f'{pair.alpha:g}' for pair in pairs)}); {MATCHED} training images of all",
            "classes are matched on; all 10,000 test images count. Mean and 95% t-interval over pairs. joint: among",
            "ten classes. The head is fixed random embeddings of the classes, shared by all networks. ensemble: the",
            "sum of both networks' logits.",
        ],
    )
    table.start()
    for method in pairs[0].accuracies:
        found = [pair.accuracies[method] for pair in pairs]
        tasks = np.array([(one.first + one.second) / 2 for one in found])
        joint = np.array([one.joint for one in found])
        table.add(
            **{
                "method": method,
                "joint %": None if np.isnan(joint).any() else interval(joint),
                "each task among its own classes %": interval(tasks),
            }
        )
    return table


def _differences(pairs: list[Pair]) -> Table:
    table = Table(
        "Dual space against each single space",
        {"dual": "", "against": "", "joint, points": "", "tasks, points": ""},
        [
            "Paired differences on the test images, mean and 95% t-interval: one that excludes 0 is a difference."
        ],
    )
    table.start()
    for dual in (HALF, CHOSEN):
        for single in ("weight", "activation"):
            gaps = [np.subtract(pair.accuracies[dual], pair.accuracies[single]) for pair in pairs]
            joint, first, second = np.array(gaps).T
            table.add(
                **{
                    "dual": dual,
                    "against": single,
                    "joint, points": interval(joint),
                    "tasks, points": interval((first + second) / 2),
                }
            )
    return table


def _disagreement(pairs: list[Pair]) -> Table:
    apart = interval(np.array([pair.apart for pair in pairs]))
    table = Table(
        "The best permutation of one space, scored in the other",
        {"permutation for": "", "weights' similarity": ".3f", "activations' similarity": ".3f"},
        [
            "Mean similarity of matched units over layers and pairs, what lies within heads left out.",
            f"{apart} % of the units (95% t-interval) are matched differently by the two single spaces.",
        ],
    )
    table.start()
    for name in ("weights", "activations", "both"):
        table.add(
            **{
                "permutation for": name,
                "weights' similarity": float(
                    np.mean([pair.scores[name, "weights"] for pair in pairs])
                ),
                "activations' similarity": float(
                    np.mean([pair.scores[name, "activations"] for pair in pairs])
                ),
            }
        )
    return table


def _draw(options: Options, pairs: list[Pair]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    assert options.plot is not None
    alphas = (0.0, *ALPHAS, 1.0)
    values = np.array([pair.over_alpha for pair in pairs])
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for one in values:
        axes.plot(alphas, one, color="0.8", linewidth=1)
    axes.plot(alphas, values.mean(0), marker="o", label="aligned, mean of the pairs")
    for name, style in (("average", ":"), ("ensemble", "--")):
        mean = np.mean([pair.accuracies[name].joint for pair in pairs])
        axes.axhline(mean, linestyle=style, color="0.4", label=name)
    axes.set_xlabel("alpha: share of the weights' similarity (0: activations only)")
    axes.set_ylabel("joint accuracy on 10 classes, %")
    axes.set_title(f"Fashion-MNIST, 5 + 5 classes, {options.network}, {len(pairs)} pairs")
    axes.legend()
    figure.tight_layout()
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.plot, dpi=120)
    pyplot.close(figure)
