"""One pair of networks of five classes each: trained, merged in every way, and measured; kept in a file of its own."""

import functools
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignment_sections import landscape
from alignment_sections.images import Images, halved
from alignment_sections.merging import (
    ACTIVATION,
    ALONE,
    ALPHAS,
    AVERAGE,
    CHOSEN,
    ENSEMBLE,
    HALF,
    PARTIAL,
    WEIGHT,
    Merging,
    apart,
)
from alignment_sections.networks import (
    BATCH,
    CLASSES,
    NETWORKS,
    RATE,
    Network,
    class_embeddings,
    train,
)

TESTED, VALIDATED, MATCHED = 2000, 1000, 1000
MAPPED = 200
"""Test images whose loss is taken along lines and over planes."""

Accuracy = tuple[float, float, float]
"""Percent of images of all classes right among all, and of each task's among its own."""


@dataclass
class Pair:
    """What one seed gives.

    Attributes:
      settings: what it depends on; a file with others is not used.
      accuracies: on the test images by method.
      validation: joint accuracy on the validation images for the alphas 0, `ALPHAS`, 1.
      alpha: the chosen one.
      similarity: per permutation the mean similarity of matched units in weights and in activations.
      apart: percent of units that the two single spaces match differently.
      lines: by alignment the losses between a and b, [points, tasks].
      planes: by alignment the losses around the merged model, [rows, columns, tasks].
      seconds: training, and all else.
    """

    settings: dict[str, Any]
    accuracies: dict[str, Accuracy] = field(default_factory=dict)
    validation: list[float] = field(default_factory=list)
    alpha: float = 0.0
    similarity: dict[str, tuple[float, float]] = field(default_factory=dict)
    apart: float = 0.0
    lines: dict[str, Any] = field(default_factory=dict)
    planes: dict[str, Any] = field(default_factory=dict)
    seconds: tuple[float, float] = (0.0, 0.0)


def pair(
    folder: Path | None, dataset: str, name: str, seed: int, data: tuple[Images, Images]
) -> Pair:
    """The pair of a file in the folder, else a new one, which is written there.

    Args:
      folder: None for nowhere.
      dataset: for the file's name.
      name: a key of `NETWORKS`.
      seed: of the classes, the initialisations and everything else.
      data: training and test images.
    """
    settings = _settings(NETWORKS[name])
    path = None if folder is None else folder / f"{dataset}-{name}-{seed}.json"
    if path is not None and path.is_file():
        found = Pair(**json.loads(path.read_text()))
        if found.settings == settings:
            return found
    found = _measured(NETWORKS[name], seed, data)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(found)) + "\n")
    return found


def _settings(network: Network) -> dict[str, Any]:
    return {
        "network": [network.label, network.side, network.examples, network.epochs],
        "training": [RATE, BATCH],
        "images": [n // network.thrift for n in (TESTED, VALIDATED, MATCHED, MAPPED)],
        "landscape": [landscape.POINTS, landscape.GRID, landscape.REACH],
    }


def _measured(network: Network, seed: int, data: tuple[Images, Images]) -> Pair:
    tested, validated, matched, mapped = (
        n // network.thrift for n in (TESTED, VALIDATED, MATCHED, MAPPED)
    )
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data[0].labels))
    validation = _some(network, data[0], order[:validated])
    test = _some(network, data[1], np.arange(tested))
    classes = rng.permutation(CLASSES)
    tasks = (classes[:5], classes[5:])
    embeddings = class_embeddings(seed)
    started = time.perf_counter()
    rest = order[validated:]
    a, b = (
        _trained(
            network, jax.random.fold_in(jax.random.key(seed), i), data[0], rest, task, embeddings
        )
        for i, task in enumerate(tasks)
    )
    jax.block_until_ready((a, b))
    trained = time.perf_counter()
    x = jnp.asarray(_some(network, data[0], rest[:matched]).images)
    merging = Merging(network, a, b, x)
    found = Pair(_settings(network))

    def logits(variables: Any, of: Images) -> np.ndarray:
        return np.asarray(_outputs(network, variables, jnp.asarray(of.images)) @ embeddings.T)

    def joint(permutations: Any) -> float:
        scores = logits(merging.averaged(permutations), validation)
        return 100 * float(np.mean(np.argmax(scores, 1) == validation.labels))

    permutations, along = merging.permutations(), merging.path()
    found.validation = [
        joint(one) for one in (permutations[ACTIVATION], *along, permutations[WEIGHT])
    ]
    chosen = int(np.argmax(found.validation[1:-1]))
    found.alpha = ALPHAS[chosen]
    permutations[CHOSEN] = along[chosen]
    merged = {name: merging.averaged(one) for name, one in permutations.items()}
    outputs = {
        name: logits(one, test)
        for name, one in {**merged, **merging.zips(), **merging.not_symmetries()}.items()
    }
    parts = [logits(one, test) for one in merging.partly_zipped()]
    if parts:
        outputs[PARTIAL] = np.sum(parts, 0)
    alone = [logits(one, test) for one in (a, b)]
    outputs[ENSEMBLE] = alone[0] + alone[1]
    found.accuracies = {
        name: _accuracy(scores, test.labels, tasks) for name, scores in outputs.items()
    }
    own = [_accuracy(scores, test.labels, tasks) for scores in alone]
    found.accuracies[ALONE] = (0.0, own[0][1], own[1][2])
    found.similarity = merging.similarity(permutations)
    found.apart = apart(permutations[WEIGHT], permutations[ACTIVATION])
    part = Images(*(array[:mapped] for array in test))
    given = landscape.examples(part, tasks, embeddings, x[:mapped])
    for name in (AVERAGE, WEIGHT, ACTIVATION, HALF):
        aligned = merging.aligned(permutations[name])
        found.lines[name] = landscape.between(network, a, aligned, given).tolist()
        if name in (AVERAGE, HALF):
            found.planes[name] = landscape.around(network, a, aligned, given, seed).tolist()
    found.seconds = (trained - started, time.perf_counter() - trained)
    return found


def _trained(
    network: Network,
    key: jax.Array,
    images: Images,
    order: np.ndarray,
    task: np.ndarray,
    embeddings: jax.Array,
) -> Any:
    mine = order[np.isin(images.labels[order], task)][: network.examples]
    if len(mine) < network.examples:
        raise ValueError(
            f"{network.examples} images of {len(task)} classes were expected, found {len(mine)}"
        )
    position = np.zeros(CLASSES, np.int32)
    position[task] = np.arange(len(task))
    part = _some(network, images, mine)
    labels = jnp.asarray(position[part.labels])
    return train(network, key, jnp.asarray(part.images), labels, embeddings[task])


def _some(network: Network, images: Images, which: np.ndarray) -> Images:
    """Some of the images, as large as the network takes them."""
    taken = images.images[which]
    return Images(taken if network.side == 28 else halved(taken), images.labels[which])


@functools.partial(jax.jit, static_argnums=0)
def _outputs(network: Network, variables: Any, images: jax.Array) -> jax.Array:
    parts = images.reshape(-1, 250, *images.shape[1:])
    found: jax.Array = jax.lax.map(lambda part: network.apply(variables, part), parts)
    return found.reshape(len(images), -1)


def _accuracy(logits: np.ndarray, labels: np.ndarray, tasks: tuple[np.ndarray, ...]) -> Accuracy:
    joint = np.mean(np.argmax(logits, 1) == labels)
    own = []
    for task in tasks:
        mine = np.isin(labels, task)
        own.append(np.mean(task[np.argmax(logits[mine][:, task], 1)] == labels[mine]))
    return 100 * float(joint), 100 * float(own[0]), 100 * float(own[1])
