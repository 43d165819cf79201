"""What a layer must compute and move, the time that this takes at the chip's measured speeds, and the share reached.

    python benchmarks/gpu/roofline.py --out benchmarks/results/kernels/NAME.json     # GPU: times, speeds and shares
    python benchmarks/gpu/roofline.py --count                                        # no GPU: the counts alone

Forward, backward (training less forward) and decode steps of the merged layer of kernel_times.py, with kept keys too.
Operations are those of the products, two for each multiplication with its addition, of pairs that count: the half of a
tile that the causal mask throws away is left out. Bytes are those of what comes in and goes out, once: what the kernels
hand each other through memory is theirs to save. The floor is the longer of operations at the speed of a large product
(bfloat16, 8192 x 8192 x 8192) and bytes at the speed of a copy, both measured in the same run; the share is the floor
over the time. Each term's formula stands beside it in the file. About a minute, most of it for compiling.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

HALF, FLOAT, LONG = 2, 4, 8  # bytes of bfloat16, float32, int64
KINDS = ("forward", "backward")


@dataclass(frozen=True)
class Layer:
    """N tokens, H query heads, K key heads, head dim D, P pre-activations (2 P features), W window, A anchors,
    E kept keys, C rows of a chunk of the linear branch (a tile of the kernels)."""

    N: int = 32768
    H: int = 32
    K: int = 8
    D: int = 128
    P: int = 64
    W: int = 128
    A: int = 4
    E: int = 0
    C: int = 64


class Term(NamedTuple):
    what: str
    formula: str
    value: float


def terms(layer: Layer, *rows: tuple[str, str]) -> list[Term]:
    names = vars(layer) | {"half": HALF, "float": FLOAT, "long": LONG}
    return [Term(what, formula, eval(formula, {"__builtins__": {}}, names)) for what, formula in rows]


def total(found: list[Term]) -> float:
    return sum(term.value for term in found)


def forward_operations(layer: Layer) -> list[Term]:
    return terms(
        layer,
        ("maps of queries and keys", "2 * N * (H + K) * D * P"),
        ("exact scores: window, anchors, kept keys", "2 * N * H * D * (W + A + E)"),
        ("their weights times values", "2 * N * H * D * (W + A + E)"),
        ("states of chunks", "2 * N * K * 2 * P * D"),
        ("queries times states", "2 * N * H * 2 * P * D"),
        ("inside a chunk: scores", "2 * N * H * 2 * P * (C + 1) / 2"),
        ("inside a chunk: weights times values", "2 * N * H * D * (C + 1) / 2"),
    )


def backward_operations(layer: Layer) -> list[Term]:
    """A product has two gradients, each as large; weights and states are not kept but computed again."""
    gradients = [Term(f"gradients: {t.what}", f"2 * ({t.formula})", 2 * t.value) for t in forward_operations(layer)]
    return gradients + terms(
        layer,
        ("again: exact scores", "2 * N * H * D * (W + A + E)"),
        ("again: states of chunks", "2 * N * K * 2 * P * D"),
        ("again: scores inside a chunk", "2 * N * H * 2 * P * (C + 1) / 2"),
    )


def forward_bytes(layer: Layer) -> list[Term]:
    return terms(
        layer,
        ("queries in, output", "2 * N * H * D * half"),
        ("keys and values in", "2 * N * K * D * half"),
        ("gates, bias of the mix", "N * (K + H) * float"),
        ("weights of the maps", "(H + K) * D * P * float"),
        ("expiries", "N * K * long * (E > 0)"),
    )


def backward_bytes(layer: Layer) -> list[Term]:
    return terms(
        layer,
        ("queries, output and its gradient in, gradient of queries", "4 * N * H * D * half"),
        ("keys and values in, their gradients", "4 * N * K * D * half"),
        ("gates, bias of the mix, their gradients", "2 * N * (K + H) * float"),
        ("log mass of either branch", "2 * N * H * float"),
        ("weights of the maps, their gradients", "2 * (H + K) * D * P * float"),
        ("expiries", "N * K * long * (E > 0)"),
    )


def decode_operations(layer: Layer) -> list[Term]:
    """Of N rows, a token each, q, k, v and pre-activations given."""
    return terms(
        layer,
        ("exact scores, weights times values", "4 * N * H * D * (W + A + E)"),
        ("queries times sums", "2 * N * H * 2 * P * (D + 1)"),
        ("a key into the sums", "2 * N * K * 2 * P * (D + 1)"),
    )


def decode_bytes(layer: Layer) -> list[Term]:
    """Of N rows, a token each: what of the state is read, what is written.

    The new token takes a slot of the window's ring, whose features are read before; a place among the kept keys changes
    hands likewise: key, value, features twice, score and position.
    """
    return terms(
        layer,
        ("sums, read and written", "2 * N * K * 2 * P * (D + 1) * float"),
        ("keys and values of the window", "2 * N * W * K * D * half"),
        ("its gates", "N * W * K * float"),
        ("anchors", "2 * N * A * K * D * half"),
        ("its slot of the new token: key, value, features twice, gate", "N * K * ((2 * D + 2 * P) * half + float)"),
        ("the token: q, o, k, v, pre-activations", "N * (2 * H * D + 2 * K * D + (H + K) * P) * half"),
        ("its gate and bias of the mix", "N * (K + H) * float"),
        ("kept keys and values", "2 * N * E * K * D * half"),
        ("their scores and positions, their gates read and written", "N * E * K * (float + long + 2 * float)"),
        ("the place that changes hands", "N * K * ((2 * D + 2 * P) * half + float + long) * (E > 0)"),
    )  # fmt: skip


OPERATIONS: dict[str, Callable[[Layer], list[Term]]] = {
    "forward": forward_operations,
    "backward": backward_operations,
    "decode": decode_operations,
}
BYTES = {"forward": forward_bytes, "backward": backward_bytes, "decode": decode_bytes}


def row(kind: str, layer: Layer, ms: float | None = None, speeds: dict[str, float] | None = None) -> dict[str, Any]:
    """Counts of one kind of call; with a time and the chip's speeds its floor and share."""
    operations, moved = OPERATIONS[kind](layer), BYTES[kind](layer)
    made: dict[str, Any] = {
        "kind": kind,
        "layer": vars(layer),
        "operations": total(operations),
        "bytes": total(moved),
        "terms": {"operations": [t._asdict() for t in operations], "bytes": [t._asdict() for t in moved]},
    }
    if ms is not None and speeds is not None:
        times = {
            "product_ms": 1e3 * total(operations) / speeds["operations_s"],
            "copy_ms": 1e3 * total(moved) / speeds["bytes_s"],
        }
        made |= times | {"ms": ms, "floor_ms": max(times.values()), "share": max(times.values()) / ms}
    return made


def product_speed(size: int = 8192) -> float:
    """Operations a second of a large product in bfloat16."""
    import torch
    from timing import median_ms

    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / (1e-3 * median_ms(lambda: a @ b, 200, graph=True))


def measured(milliseconds: int, lengths: list[int], write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Times of this GPU with their floors, written as they come."""
    import torch
    from environment import environment
    from kept import PLACES, layer, scores_of
    from kept_decode import LAYERS, WINDOW, copy_speed, timed_step
    from shapes import ANCHORS, make_layer
    from timing import median_ms

    import lizard_ops

    speeds = {"operations_s": product_speed(), "bytes_s": 1e3 * copy_speed()}
    found: dict[str, Any] = {"environment": environment(), "speeds": speeds, "rows": []}
    for length in lengths:
        x = make_layer(length)
        inputs = [t for t in vars(x).values() if t.requires_grad]
        scores = scores_of("random", x.k.shape[0], length, x.k.shape[2])
        for kept in (0, PLACES):
            options = (scores, 128, ANCHORS, kept)
            expiry = lizard_ops.key_expiry(*options).expiry if kept else None

            def forward(x: Any = x, expiry: Any = expiry) -> None:
                with torch.no_grad():
                    layer(x, expiry)

            def train(x: Any = x, expiry: Any = expiry, inputs: Any = inputs) -> None:
                torch.autograd.grad(layer(x, expiry), inputs, x.grad, allow_unused=True)

            train()
            forward_ms = median_ms(forward, milliseconds, graph=True)
            times = forward_ms, median_ms(train, milliseconds, graph=True) - forward_ms
            for kind, ms in zip(KINDS, times, strict=True):
                found["rows"].append({"length": length} | row(kind, Layer(E=kept), ms, speeds))
            write(found)
        del x, inputs, scores, expiry
        torch.cuda.empty_cache()
    for batch in LAYERS:
        for kept in (0, PLACES):
            step = timed_step(batch, kept, speeds["bytes_s"] / 1e3, milliseconds)
            at = Layer(N=batch, W=WINDOW, E=kept)
            found["rows"].append({"batch": batch} | row("decode", at, step["us"] / 1e3, speeds))
            write(found)
    return found


def counts() -> dict[str, Any]:
    layers = [("forward", Layer()), ("backward", Layer())] + [("decode", Layer(N=n, W=384)) for n in (1, 16, 64)]
    return {"rows": [row(kind, at) for kind, layer in layers for at in (layer, replace(layer, E=256))]}


def name_of(found: dict[str, Any]) -> str:
    kept = f", {found['layer']['E']} kept" if found["layer"]["E"] else ""
    at = f", batch {found['layer']['N']}" if found["kind"] == "decode" else ""
    return f"{found['kind']}{kept}{at}" + (f", T = {found['length']}" if "length" in found else "")


def table(results: dict[str, Any]) -> str:
    """In Markdown."""
    lines = ["| | GFLOP | MB | at the product's speed, us | at the copy's, us | time, us | share |", "|---" * 7 + "|"]
    for found in results["rows"]:
        cells = [name_of(found), f"{found['operations'] / 1e9:.3g}", f"{found['bytes'] / 1e6:.4g}"]
        timed = "ms" in found
        cells += [f"{1e3 * found[name]:,.1f}" if timed else "" for name in ("product_ms", "copy_ms", "ms")]
        cells.append(f"{found['share']:.0%}" if timed else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--count", action="store_true", help="counts alone, without a GPU")
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 32768])
    parser.add_argument("--milliseconds", type=int, default=100, help="time spent on each median")
    options = parser.parse_args()

    def write(results: dict[str, Any]) -> None:
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n")

    results = counts() if options.count else measured(options.milliseconds, options.lengths, write)
    write(results)
    if "speeds" in results:
        speeds = results["speeds"]
        print(f"product {speeds['operations_s'] / 1e12:.0f} TFLOP/s, copy {speeds['bytes_s'] / 1e12:.2f} TB/s")
    print(table(results))


if __name__ == "__main__":
    main()
