"""How long a first merge of a deep decoder takes, compilation included.

A 24-layer decoder has 218 tensors in 8 shapes. Each figure is the first call in a fresh process, median of several:

    eager    jm.merge as it stands
    jit      jm.merge inside the caller's jit
    apply    a jitted candidate from a state that `init` made (init shown apart)
    stacked  jm.merge inside a jit, the layers stacked on axis 0

    python benchmarks/compile_time.py [--methods ties ...] [--runs 3] [--json OUT]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FORMS = ("eager", "jit", "init", "apply", "stacked")


def decoder(depth: int, seed: int, width: int = 64) -> dict[str, Any]:
    """Nine tensors a layer, an embedding and a norm."""
    import numpy as np

    rng = np.random.default_rng(seed)
    shapes = {
        "q": (width, width),
        "k": (width // 4, width),
        "v": (width // 4, width),
        "o": (width, width),
        "gate": (3 * width, width),
        "up": (3 * width, width),
        "down": (width, 3 * width),
        "norm1": (width,),
        "norm2": (width,),
    }

    def draw(shape: tuple[int, ...]) -> Any:
        return rng.normal(size=shape).astype(np.float32)

    layers = {f"layers_{i}": {n: draw(s) for n, s in shapes.items()} for i in range(depth)}
    return {"embed": draw((256, width)), "norm": draw((width,)), **layers}


def measure(name: str, options: dict[str, Any], depth: int, form: str) -> float:
    """Seconds of one first call, in this process."""
    import jax
    import jax.numpy as jnp

    import jaxmerge as jm

    def stacked(tree: Any) -> Any:
        layers = jm.tree.stack([tree[f"layers_{i}"] for i in range(depth)])
        return {"embed": tree["embed"], "norm": tree["norm"], "layers": layers}

    method = jm.methods.get(name)(**options)
    base, *models = (jax.tree.map(jnp.asarray, decoder(depth, seed)) for seed in range(3))
    layout = None
    if form == "stacked":
        base, *models = map(stacked, (base, *models))
        layout = jm.tree.stacked_layout(base, {"layers/": "layers_{layer}/"})
    if method.base == "source":
        models = models[:1]
    key = jax.random.key(0) if method.random else None
    jax.block_until_ready((base, models))

    def whole(models: Any, base: Any) -> Any:
        return jm.merge(method, models, base=base, key=key, layout=layout)

    state = method.init(models, base) if form == "apply" else None
    started = time.perf_counter()
    if form == "eager":
        result = whole(models, base)
    elif form == "init":
        result = method.init(models, base)
    elif form == "apply":
        result = jax.jit(lambda state: method.apply(state, {}, key))(state)
    else:
        result = jax.jit(whole)(models, base)
    jax.block_until_ready(result)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["ties"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(measure(*json.loads(arguments.one)))
        return
    from machine import describe, headline

    machine = describe()
    print(headline(machine), "\n")
    rows = []
    print(
        f"{'method':<28}{'layers':>7}" + "".join(f"{form:>10}" for form in FORMS) + "   (seconds)"
    )
    for name in arguments.methods:
        variants = [{"scope": "tensor"}, {"scope": "model"}] if name == "ties" else [{}]
        for options in variants:
            for depth in (24, 48):
                row: dict[str, Any] = {"method": name, "options": options, "layers": depth}
                for form in FORMS:
                    task = json.dumps([name, options, depth, form])
                    runs = [
                        float(
                            subprocess.run(
                                [sys.executable, __file__, "--one", task],
                                check=True,
                                capture_output=True,
                                text=True,
                            ).stdout
                        )
                        for _ in range(arguments.runs)
                    ]
                    row[form] = round(statistics.median(runs), 2)
                rows.append(row)
                label = name + "".join(f" {k}={v}" for k, v in options.items())
                cells = "".join(f"{row[form]:>10.2f}" for form in FORMS)
                print(f"{label:<28}{depth:>7}{cells}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
