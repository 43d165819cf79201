"""Outputs, states and gradients of every op form on fixed inputs, to hold beside those of another commit.

    python benchmarks/same_numbers.py --out now.npz                       # on a CPU: PyTorch, and Triton's interpreter
    python benchmarks/same_numbers.py --out now.npz --device cuda         # the kernels themselves
    PYTHONPATH=OTHER_CHECKOUT python benchmarks/same_numbers.py --out then.npz
    python benchmarks/same_numbers.py --compare then.npz now.npz

Only names that ``lizard_ops`` exports are called. The comparison prints how many arrays are equal bit for bit and the
largest difference of the others, and ends with exit code 1 if one is missing or differs by more than --tolerance.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

GATES = ("none", "scalar", "key", "query", "channel")
B, HQ, HK, D, FP, W, ANCHORS = 2, 4, 2, 16, 16, 6, 3


def tensors(length: int, device: str, dtype: str, features: int, gate: str) -> dict[str, Any]:
    """Inputs drawn from one seed on the CPU, whatever the device."""
    import torch

    draw = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=draw).to(device, getattr(torch, dtype)).requires_grad_()

    widths = {"none": None, "scalar": (1,), "key": (HK,), "query": (HQ,), "channel": (HK, features)}
    width = widths[gate]
    g = None
    if width is not None:
        g = (-torch.rand(B, length, *width, generator=draw) * 0.3).to(device).requires_grad_()
    return {
        "q": normal(B, length, HQ, D), "k": normal(B, length, HK, D), "v": normal(B, length, HK, D),
        "fq": normal(B, length, HQ, FP), "fk": normal(B, length, HK, FP), "g": g,
        "sinks": normal(HQ, 2).detach().float().requires_grad_(), "bias": normal(HQ).detach().float().requires_grad_(),
    }  # fmt: skip


def cases(device: str, gates: tuple[str, ...]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, op, options) of every form that the implementations of this device compute."""
    lengths = (5, 37) if device == "cpu" else (5, 37, 200)
    impls = ("torch", "triton")
    dtypes = ("float32",) if device == "cpu" else ("float32", "bfloat16")
    for impl, dtype, length, gate in itertools.product(impls, dtypes, lengths, gates):
        base = {"impl": impl, "dtype": dtype, "length": length, "gate": gate}
        for normalize, offset in itertools.product((True, False), (0, W)):
            yield "gated", f"{normalize}-{offset}", {**base, "normalize": normalize, "window_offset": offset}
        for mix, coverage, feature_map in itertools.product(("sum", "merge"), ("all", "outside"), ("softmax", "exp")):
            options = {**base, "mix": mix, "coverage": coverage, "feature_map": feature_map}
            yield "hybrid", f"{mix}-{coverage}-{feature_map}", options
    if "none" not in gates:
        return
    for impl, dtype, length, softcap in itertools.product(impls, dtypes, lengths, (None, 20.0)):
        options = {"impl": impl, "dtype": dtype, "length": length, "gate": "none", "softcap": softcap}
        yield "window", f"{softcap}", options


def outputs(op: str, options: dict[str, Any], device: str) -> dict[str, Any]:
    """Outputs, final state and gradients of one case."""
    import torch

    import lizard_ops

    options = dict(options)
    length, dtype, gate, impl = (options.pop(key) for key in ("length", "dtype", "gate", "impl"))
    hybrid = op == "hybrid"
    features = 2 * FP if hybrid else D
    x = tensors(length, device, dtype, features, gate)
    shared: dict[str, Any] = {"impl": impl, "output_final_state": True, **options}
    if op == "gated":
        q, k = (x[name].float().softmax(-1).to(x["v"].dtype) for name in ("q", "k"))
        o, state = lizard_ops.chunk_gated_attn(q, k, x["v"], x["g"], anchors=ANCHORS, **shared)
    elif op == "window":
        o, state = lizard_ops.window_attn(x["q"], x["k"], x["v"], W, anchors=ANCHORS, sinks=x["sinks"], **shared)[:2]
    else:
        extra = {"merge_bias" if options["mix"] == "merge" else "alpha": x["bias"]}
        o, state = lizard_ops.chunk_hybrid_attn(
            *(x[name] for name in ("q", "k", "v", "fq", "fk", "g")), W, anchors=ANCHORS, sinks=x["sinks"],
            **extra, **shared,
        )  # fmt: skip
    found = {"o": o} | {f"state.{name}": t for name, t in state._asdict().items() if t is not None}
    leaves = {name: t for name, t in x.items() if t is not None}
    floating = [t.float() for t in (o, *state) if t is not None and t.is_floating_point() and t.requires_grad]
    weights = torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape)
    loss = (o.float() * weights).sum() + sum(t.clamp(min=-1e3).sum() for t in floating[1:]) * 0.1
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found |= {f"grad.{name}": t for name, t in zip(leaves, gradients, strict=True) if t is not None}
    return {name: t.detach().double().cpu().numpy() for name, t in found.items()}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--gates", default=",".join(GATES), help="so that processes can share the work")
    parser.add_argument("--compare", nargs=2, metavar="FILE")
    parser.add_argument("--tolerance", type=float, default=0.0)
    options = parser.parse_args()
    if options.compare:
        sys.exit(compare(*options.compare, options.tolerance))
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    found: dict[str, np.ndarray] = {}
    refused = 0
    for op, name, case in cases(options.device, tuple(options.gates.split(","))):
        label = f"{op}/{case['impl']}/{case['dtype']}/{case['length']}/{case['gate']}/{name}"
        try:
            values = outputs(op, case, options.device)
        except ValueError as error:
            if "impl" not in str(error) and "triton" not in str(error):
                raise
            refused += 1
            continue
        found |= {f"{label}/{key}": value for key, value in values.items()}
    np.savez_compressed(options.out, **found)
    print(f"{len(found)} arrays, {refused} cases that an implementation refuses")


def compare(then: str, now: str, tolerance: float) -> int:
    """Prints what differs; 1 if something does beyond the tolerance."""
    with np.load(then) as a, np.load(now) as b:
        missing = sorted(set(a.files) ^ set(b.files))
        shared = [name for name in a.files if name in b.files]
        equal, worst, where = 0, 0.0, ""
        for name in shared:
            if np.array_equal(a[name], b[name], equal_nan=True):
                equal += 1
                continue
            scale = max(1.0, float(np.abs(a[name][np.isfinite(a[name])]).max(initial=0.0)))
            with np.errstate(invalid="ignore"):
                difference = np.where(a[name] == b[name], 0.0, np.abs(a[name] - b[name])).max() / scale
            if not difference <= worst:
                worst, where = float(difference), name
    print(f"{equal} of {len(shared)} arrays equal bit for bit; largest difference of the others {worst:.3g} {where}")
    print(f"in one file alone: {len(missing)} {' '.join(missing[:3])}")
    return int(bool(missing) or not worst <= tolerance)


if __name__ == "__main__":
    main()
