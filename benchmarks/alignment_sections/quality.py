"""What merging loses and alignment gains: networks of five classes each, merged into one of ten."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from report import Table

from alignment_sections import Options, half_width, interval, landscape, pictures
from alignment_sections.images import DATASETS, load
from alignment_sections.merging import (
    ACTIVATION,
    ALONE,
    ALPHAS,
    AVERAGE,
    CHOSEN,
    DUAL_ZIP,
    ENSEMBLE,
    FLAT,
    HALF,
    KEPT_APART,
    PARTIAL,
    SPLIT,
    WEIGHT,
    ZIP,
)
from alignment_sections.networks import NETWORKS
from alignment_sections.pairs import MAPPED, MATCHED, TESTED, VALIDATED, Pair, pair

METHODS = (AVERAGE, WEIGHT, ACTIVATION, HALF, CHOSEN, ZIP, DUAL_ZIP, PARTIAL, ENSEMBLE, ALONE)
ORDER = (AVERAGE, WEIGHT, ACTIVATION, CHOSEN, ZIP, DUAL_ZIP, PARTIAL, ENSEMBLE)
"""From the lowest joint accuracy to the highest, as the papers report it."""

Pairs = Mapping[str, Sequence[Pair]]


def run(options: Options) -> Iterator[Table]:
    for dataset in options.datasets:
        data = load(dataset, options.data)
        pairs: dict[str, list[Pair]] = {}
        for name in options.networks:
            pairs[name] = []
            for i in range(options.seeds):
                one = pair(options.cache, dataset, name, options.seed + i, data)
                pairs[name].append(one)
                seconds = " + ".join(f"{value:.0f}" for value in one.seconds)
                print(f"  {dataset}, {name}, pair {i}: {seconds} s", flush=True)
        label = DATASETS[dataset]
        tables = [
            _accuracies(label, pairs),
            _order(label, pairs),
            _differences(label, pairs),
            _disagreement(label, pairs),
            _landscape(label, pairs),
        ]
        if any({SPLIT, FLAT} & found[0].accuracies.keys() for found in pairs.values()):
            tables.append(_shortcuts(label, pairs))
        if options.plots is not None:
            labels = {name: NETWORKS[name].label for name in pairs}
            tables[0].pictures = [pictures.over_alpha(options.plots, dataset, label, labels, pairs)]
            tables[4].pictures = [
                pictures.barriers(options.plots, dataset, label, labels, pairs),
                pictures.planes(options.plots, dataset, label, labels, pairs),
            ]
        yield from tables


def _accuracies(label: str, pairs: Pairs) -> Table:
    trained = "; ".join(
        f"{n.label}: {n.epochs} epochs on {n.examples} images of {n.side} x {n.side}"
        for n in (NETWORKS[name] for name in pairs)
    )
    alphas = "; ".join(
        f"{NETWORKS[name].label}: {', '.join(f'{one.alpha:g}' for one in found)}"
        for name, found in pairs.items()
    )
    table = Table(
        f"Accuracy of merged networks, {label}",
        {"method": "", **dict.fromkeys(_columns(pairs, ("joint", "tasks")), "")},
        [
            f"{len(next(iter(pairs.values())))} pairs of networks per kind; percent, mean and 95% t-interval over",
            f"pairs. Each network is trained on its own five random classes ({trained}). joint: right among",
            f"ten classes; tasks: each task's images among its own classes. {TESTED} test images. {VALIDATED} training",
            f"images that nothing else uses choose alpha among {ALPHAS[0]} to {ALPHAS[-1]} (chosen: {alphas});",
            f"{MATCHED} training images of all classes are matched on. The head is fixed random embeddings of the",
            "classes, shared by all networks. Zips: a .5, b 1, the dual one at alpha .5; partial zip: the first",
            f"{KEPT_APART:.0%} of the layers by activations, its two tails' logits added. ensemble: the sum of both",
            "networks' logits.",
            *_peculiar(pairs),
        ],
    )
    table.start()
    for method in METHODS:
        cells = {}
        for name, found in pairs.items():
            if method not in found[0].accuracies:
                continue
            values = np.array([one.accuracies[method] for one in found])
            joint, tasks = _columns({name: found}, ("joint", "tasks"))
            cells[joint] = None if method == ALONE else interval(values[:, 0])
            cells[tasks] = interval(values[:, 1:].mean(1))
        table.add(method=method, **cells)
    return table


def _peculiar(pairs: Pairs) -> Iterator[str]:
    """What is done otherwise with some of the networks."""
    networks = [NETWORKS[name] for name in pairs]
    if "vit" in pairs:
        yield "The ViT's stream of units leaves no first part that could be merged alone."
    if any(network.batch_norm for network in networks):
        yield "BatchNorm's statistics are computed anew on half of the matched images after every merge."
    for network in networks:
        if network.thrift > 1:
            yield f"{network.label} is measured and matched on 1/{network.thrift} of these images."


def _order(label: str, pairs: Pairs) -> Table:
    gaps: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for name, found in pairs.items():
        present = [method for method in ORDER if method in found[0].accuracies]
        for step in itertools.pairwise(present):
            gaps.setdefault(step, {})[name] = _gap(found, step[1], step[0])[0]
    every = [(step, name, gap) for step, each in gaps.items() for name, gap in each.items()]
    counts = {word: sum(_word(gap) == word for *_, gap in every) for word in ("up", "open", "down")}
    falling = [
        f"{step[0]} to {step[1]} ({NETWORKS[name].label}{', beyond its interval' if word == 'down' else ''})"
        for step, name, gap in every
        if (word := _word(gap)) == "down" or float(np.mean(gap)) < 0
    ]
    table = Table(
        f"The papers' order, {label}",
        {"step": "", **{NETWORKS[name].label: "" for name in pairs}},
        [
            f"Reported: {' < '.join(ORDER)}. Paired differences of joint accuracy in points, mean and 95% t-interval:",
            "up: all of it is above 0; down: below; open: 0 lies in it.",
            f"Of {len(every)} steps {counts['up']} go up as reported, {counts['open']} are open and",
            f"{counts['down']} go down.",
            "The order holds for the means."
            if not falling
            else "Not even the means are in that order: these fall:",
            *([f"{'; '.join(falling)}."] if falling else []),
        ],
    )
    table.start()
    for step in sorted(gaps, key=lambda step: [ORDER.index(method) for method in step]):
        cells = {
            NETWORKS[name].label: f"{interval(gap)} {_word(gap)}"
            for name, gap in gaps[step].items()
        }
        table.add(step=f"{step[0]} to {step[1]}", **cells)
    return table


def _differences(label: str, pairs: Pairs) -> Table:
    table = Table(
        f"Dual space against each single space, {label}",
        {
            "dual": "",
            "against": "",
            **dict.fromkeys(_columns(pairs, ("joint", "tasks")), ""),
        },
        ["Paired differences on the test images in points, mean and 95% t-interval."],
    )
    table.start()
    for dual in (HALF, CHOSEN):
        for single in (WEIGHT, ACTIVATION):
            cells = {}
            for name, found in pairs.items():
                joint, tasks = _columns({name: found}, ("joint", "tasks"))
                gaps = _gap(found, dual, single)
                cells[joint], cells[tasks] = (f"{interval(gap)} {_word(gap)}" for gap in gaps)
            table.add(dual=dual, against=single, **cells)
    return table


def _disagreement(label: str, pairs: Pairs) -> Table:
    table = Table(
        f"The best permutation of one space, scored in the other, {label}",
        {
            "permutation for": "",
            **dict.fromkeys(_columns(pairs, ("weights", "activations")), ".3f"),
        },
        [
            "Mean similarity of matched units over layers and pairs, what lies within heads left out. Last row:",
            "percent of all units that the two single spaces match differently (95% t-interval).",
        ],
    )
    table.start()
    for title, method in (
        ("nothing", AVERAGE),
        ("weights", WEIGHT),
        ("activations", ACTIVATION),
        ("both, alpha .5", HALF),
    ):
        cells = {}
        for name, found in pairs.items():
            means = np.mean([one.similarity[method] for one in found], 0)
            columns = _columns({name: found}, ("weights", "activations"))
            cells |= dict(zip(columns, map(float, means), strict=True))
        table.add(**{"permutation for": title, **cells})
    differ = {
        _columns({name: found}, ("weights",))[0]: interval(np.array([one.apart for one in found]))
        for name, found in pairs.items()
    }
    table.add(**{"permutation for": "matched differently, %", **differ})
    return table


def _landscape(label: str, pairs: Pairs) -> Table:
    table = Table(
        f"Between the networks and around their merge, {label}",
        {"alignment": "", **dict.fromkeys(_columns(pairs, ("barrier", "middle", "overlap")), "")},
        [
            f"Losses on {MAPPED} test images, each task's among its own classes. barrier: how far the tasks' mean",
            f"loss at {landscape.POINTS} points of the line between both networks rises above that between its ends,",
            "nats: 0 where each end is so bad at the other's task that no point between rises above; middle: that loss",
            f"half way. overlap: of a grid of {landscape.GRID} x {landscape.GRID} in the plane through the merged",
            "model (one axis to the networks, one in a random direction, leaf by leaf as long) the percent of the",
            f"points where both tasks' loss is low (at most {landscape.LOW:.2f}, half of guessing's) among those where",
            "either's is.",
        ],
    )
    table.start()
    for method in (AVERAGE, WEIGHT, ACTIVATION, HALF):
        cells: dict[str, str | None] = {}
        for name, found in pairs.items():
            barrier, middle, overlap = _columns({name: found}, ("barrier", "middle", "overlap"))
            lines = [np.asarray(one.lines[method]) for one in found]
            cells[barrier] = interval(np.array([landscape.barrier(line) for line in lines]), 2)
            half_way = [np.mean(line[landscape.POINTS // 2]) for line in lines]
            cells[middle] = interval(np.array(half_way), 2)
            if method in found[0].planes:
                shares = np.array([landscape.overlap(one.planes[method]) for one in found])
                cells[overlap] = interval(shares)
        table.add(alignment="none" if method == AVERAGE else method, **cells)
    return table


def _shortcuts(label: str, pairs: Pairs) -> Table:
    table = Table(
        f"Heads and groups, {label}",
        {"network": "", "permuted": "", "joint": "", "tasks": "", "joint, points": ""},
        [
            "Dual space, alpha .5. joint trees: heads with all that is in them, channels within their groups, which",
            "changes nothing in what the permuted network computes; heads split: queries and keys apart from values,",
            "as in MuDSC's own code; groups flat: channels across GroupNorm's groups. points: paired difference from",
            "the tree, 95% t-interval.",
        ],
    )
    table.start()
    for name, found in pairs.items():
        for other in (SPLIT, FLAT):
            if other not in found[0].accuracies:
                continue
            for method in (HALF, other):
                values = np.array([one.accuracies[method] for one in found])
                gap = _gap(found, other, HALF)[0]
                table.add(
                    **{
                        "network": NETWORKS[name].label,
                        "permuted": "tree" if method == HALF else other.partition(", ")[2],
                        "joint": interval(values[:, 0]),
                        "tasks": interval(values[:, 1:].mean(1)),
                        "joint, points": None
                        if method == HALF
                        else f"{interval(gap)} {_word(gap)}",
                    }
                )
    return table


def _columns(pairs: Pairs, kinds: Sequence[str]) -> list[str]:
    return [f"{NETWORKS[name].label}: {kind}" for name in pairs for kind in kinds]


def _gap(found: Sequence[Pair], one: str, other: str) -> tuple[np.ndarray, np.ndarray]:
    """By pair how far one method is above another, joint and over the tasks."""
    gaps = np.array([np.subtract(p.accuracies[one], p.accuracies[other]) for p in found])
    return gaps[:, 0], gaps[:, 1:].mean(1)


def _word(values: np.ndarray) -> str:
    mean, half = float(np.mean(values)), half_width(values)
    return "up" if mean > half else "down" if mean < -half else "open"
