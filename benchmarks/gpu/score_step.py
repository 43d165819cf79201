"""Time a decode step of the scores of keys, by the kernels and in PyTorch, and of a whole layer that keeps keys.

    python benchmarks/gpu/score_step.py --out benchmarks/results/kernels/NAME.json

Each step runs in a CUDA graph of a step on several states. "score" is ``KeyScore`` alone, its matrix product included;
"layer" the whole of ``HybridAttention`` from q, k and v on, in place, with its scores by the kernels or in PyTorch.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from environment import environment
from timing import median_ms
from torch import Tensor

from lizard_layers import AttentionConfig, HybridAttention, InWindow, LayerState, empty_state

SHAPES: dict[str, dict[str, int]] = {
    "smollm2-135m": dict(hidden_size=576, num_heads=9, num_key_heads=3, head_dim=64),
    "llama-3-8b": dict(hidden_size=4096, num_heads=32, num_key_heads=8, head_dim=128),
}
SCORES: dict[str, dict[str, Any]] = {
    "plain": {},
    "received": dict(score_received=True),
    "received, every query": dict(score_received=True, score_stride=1),
}
BATCHES, STATES = (1, 64), 6


def layer_of(shape: str, score: str, window: int) -> HybridAttention:
    torch.manual_seed(0)
    choices = dict(window=window, anchors=4, kept_keys=256, **SCORES[score])
    with torch.device("cuda"):
        return HybridAttention(AttentionConfig(**SHAPES[shape], **choices)).requires_grad_(False)


class Step:
    """One token of each sequence into ``STATES`` states, which have seen some."""

    def __init__(self, layer: HybridAttention, batch: int) -> None:
        config, self.layer = layer.config, layer
        heads = [config.num_heads, config.num_key_heads, config.num_key_heads]
        self.x = self.normal(batch, 1, config.hidden_size)
        self.wide = self.x.float()  # as the layer makes it for its gate
        self.q, self.k, self.v = (self.normal(batch, 1, n, config.head_dim) for n in heads)
        self.rope = tuple(self.normal(1, 1, config.head_dim) for _ in range(2))
        self.states = [empty_state(config, batch, torch.bfloat16, "cuda") for _ in range(STATES)]
        for state in self.states:
            assert isinstance(state, LayerState)
            state.attention.position.fill_(1000)
            state.score.position.fill_(1000)
            for t in (state.attention.ring_k, state.attention.ring_v, state.score.key_sum):
                assert t is not None
                t.normal_()

    @staticmethod
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    def score(self, impl: str) -> None:
        made = self.layer.key_score
        assert made is not None
        for state in self.states:
            held = state.attention
            seen = InWindow(self.q, self.k, held.ring_k, held.anchor_k) if made.received is not None else None
            made(self.wide, self.k, self.v, state.score, True, seen=seen, inplace=True, impl=impl)

    def whole(self, impl: str) -> None:
        made = self.layer.key_score
        assert made is not None
        forward = type(made).forward

        def by_impl(*given: Any) -> Any:
            return forward(made, *given[:-1], impl)

        made.forward = by_impl  # type: ignore[method-assign]
        for state in self.states:
            self.layer(self.x, self.q, self.k, self.v, self.rope, state, True, inplace=True)
        del made.forward


@torch.no_grad()
def measure(milliseconds: int) -> list[dict[str, Any]]:
    rows = []
    for shape in SHAPES:
        for score in SCORES:
            layer = layer_of(shape, score, 128)
            for batch in BATCHES:
                step, row = Step(layer, batch), {"shape": shape, "score": score, "batch": batch}
                for name, run in (("score", step.score), ("layer", step.whole)):
                    for impl in ("triton", "torch"):
                        run(impl)
                        ms = median_ms(lambda run=run, impl=impl: run(impl), milliseconds, graph=True)
                        row[f"{name} {impl} us"] = 1e3 * ms / STATES
                rows.append(row)
                print("  ".join(f"{n} {x:.2f}" if isinstance(x, float) else f"{x:>12}" for n, x in row.items()))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--milliseconds", type=int, default=40, help="how long each is timed")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = {"rows": measure(args.milliseconds), "environment": environment()}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
