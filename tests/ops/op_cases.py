"""Random cases of the three ops, and one way to call each form of each op on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import lizard_ops
from lizard_ops import AttentionState

TENSORS = {"gated": ("q", "k", "v", "g"), "window": ("q", "k", "v"), "hybrid": ("q", "k", "v", "fq", "fk", "g")}
LENGTHS = (0, 1, 2, 3, 5, 7, 8, 9, 13, 16, 17, 23)  # around the chunks of the tests (4, 8), and primes
GATES = (None, "token", "key", "query", "channel")


@dataclasses.dataclass
class Case:
    """Arguments of one call, in float64 on the CPU: token tensors [B, T, ...], weights without, plain options."""

    op: str
    tokens: dict[str, Tensor | None]
    weights: dict[str, Tensor]
    options: dict[str, Any]

    @property
    def length(self) -> int:
        return self.tokens["q"].shape[1]

    def map(self, change: Callable[[str, Tensor], Tensor], weights: bool = False) -> Case:
        """The case with every token tensor (and weight) changed."""

        def changed(xs: dict) -> dict:
            return {name: None if x is None else change(name, x) for name, x in xs.items()}

        return dataclasses.replace(
            self, tokens=changed(self.tokens), weights=changed(self.weights) if weights else self.weights
        )

    def part(self, rows: slice, at: slice | Tensor) -> Case:
        """Some rows and positions."""
        return self.map(lambda _, x: x[rows][:, at])

    def cast(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """In the dtype under test; gates stay float32 or better, as the ops want them."""

        def to(name: str, x: Tensor) -> Tensor:
            wide = name == "g" and dtype in (torch.bfloat16, torch.float16)
            return x.to(device, torch.float32 if wide else dtype)

        return self.map(to, weights=True)

    def leaves(self) -> dict[str, Tensor]:
        return {name: x for name, x in (self.tokens | self.weights).items() if x is not None}


def call(case: Case, form: str, state: AttentionState | None = None, **more: Any) -> dict[str, Tensor]:
    """Outputs by name: o, the log mass or lse where the op returns it, and every field of the final state."""
    name = {"gated": f"{form}_gated_attn", "hybrid": f"{form}_hybrid_attn"}.get(case.op)
    name = name or ("naive_window_attn" if form == "naive" else "window_attn")
    kinds = {"gated": "return_log_mass", "window": "return_lse"}  # the log of a signed mass is no number
    extra = {kinds[case.op]: True} if case.op in kinds and case.options.get("normalize", True) else {}
    inputs = [case.tokens[x] for x in TENSORS[case.op]]
    by_token = {x: t for x, t in case.tokens.items() if x not in TENSORS[case.op]}
    options = case.options | case.weights | by_token | extra | more
    if form == "naive":
        options.pop("chunk_size", None)
        options.pop("impl", None)
    if form == "recurrent":
        options.pop("chunk_size", None)
    size = [options.pop("window")] if "window" in options else []
    o, final, *log = getattr(lizard_ops, name)(*inputs, *size, initial_state=state, output_final_state=True, **options)
    fields = {f"state.{x}": t for x, t in final._asdict().items() if t is not None}
    return {"o": o} | ({"log": log[0]} if log else {}) | fields


def state_in(outputs: dict[str, Tensor]) -> AttentionState:
    """The final state among the outputs of ``call``."""
    fields = {name.removeprefix("state."): x for name, x in outputs.items() if name.startswith("state.")}
    return AttentionState(**fields)


@st.composite
def cases(
    draw: st.DrawFn, op: str, lengths: tuple[int, ...] = LENGTHS, rows: tuple[int, ...] = (1, 2), **fixed
) -> Case:
    """A case of this op; ``fixed`` options are not drawn."""

    def pick(name: str, *values: Any) -> Any:
        return fixed[name] if name in fixed else draw(st.sampled_from(values), label=name)

    b, t, hk, group = pick("B", *rows), pick("T", *lengths), pick("Hk", 1, 2), pick("G", 1, 2, 3)
    k, v, hq = pick("K", 1, 3, 8), pick("V", 1, 5, 8), hk * group
    generator = torch.Generator().manual_seed(pick("seed", *range(50)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens: dict[str, Tensor | None] = {"q": normal(b, t, hq, k), "k": normal(b, t, hk, k), "v": normal(b, t, hk, v)}
    weights: dict[str, Tensor] = {}
    options: dict[str, Any] = {"anchors": pick("anchors", 0, 1, 3)}
    features = k
    if op != "gated":
        options |= {"window": pick("window", 1, 2, 4, 9), "scale": pick("scale", None, 0.3)}
        if pick("sinks", False, True):
            weights["sinks"] = normal(hq, 2) if pick("sinks_a_head", False, True) else normal(3)
    if op == "hybrid":
        options |= {name: pick(name, *values) for name, values in HYBRID.items()}
        fp, two_sided = pick("Fp", 1, 4, 5), options["feature_map"] != "identity"
        features = 2 * fp if two_sided else fp
        tokens |= {"fq": normal(b, t, hq, fp) * 2, "fk": normal(b, t, hk, fp) * 2}
        tokens = tokens if two_sided else tokens | {x: tokens[x].abs() for x in ("fq", "fk")}
        options["normalize"] = options["mix"] == "merge" or pick("normalize", True, False)
        weight = pick("weight", None, "head", "token")
        name = "merge_bias" if options["mix"] == "merge" else "alpha"
        if weight == "head":
            weights[name] = normal(hq)
        elif weight == "token":
            tokens[name] = normal(b, t, hq)
    if op == "gated":
        options |= {"window_offset": pick("offset", 0, 1, 5), "normalize": pick("normalize", True, False)}
        options |= {"chunk_size": pick("chunk_size", None, 4), "scale": pick("scale", None, 2.0)}
        tokens |= {x: tokens[x].abs() for x in ("q", "k")} if options["normalize"] else {}
    if op != "window":
        shape = {"token": (1,), "key": (hk,), "query": (hq,), "channel": (hk, features)}
        gate = pick("gate", *GATES)
        decay = pick("decay", 0.02, 0.5, 5.0)
        tokens["g"] = None if gate is None else -decay * normal(b, t, *shape[gate]).abs()
        if gate == "token" and draw(st.booleans()):
            tokens["g"] = tokens["g"].squeeze(-1)
    return Case(op, tokens, weights, options)


HYBRID = {
    "mix": ("sum", "merge"),
    "coverage": ("all", "outside"),
    "feature_map": ("identity", "softmax", "exp"),
    "merge_mass": ("relative", "absolute"),
}
