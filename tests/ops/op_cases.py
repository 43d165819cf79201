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
LENGTHS = (23, 17, 16, 13, 9, 8, 7, 5, 3, 2, 1, 0)  # around the chunks of the tests (4, 8), and primes
GATES = ("channel", "query", "key", "token", None)


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


def call(
    case: Case, form: str, state: AttentionState | None = None, final: bool | None = True, **more: Any
) -> dict[str, Tensor]:
    """Outputs by name: o, the log mass or lse where the op returns it, and every field of the final state.

    final: whether that is asked for; None says nothing of it.
    """
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
    asked = {} if final is None else {"output_final_state": final}
    o, after, *log = getattr(lizard_ops, name)(*inputs, *size, initial_state=state, **asked, **options)
    assert (after is not None) == bool(final), f"output_final_state={final}: the state is {type(after).__name__}"
    fields = {} if after is None else {f"state.{x}": t for x, t in after._asdict().items() if t is not None}
    return {"o": o} | ({"log": log[0]} if log else {}) | fields


def state_in(outputs: dict[str, Tensor]) -> AttentionState:
    """The final state among the outputs of ``call``."""
    fields = {name.removeprefix("state."): x for name, x in outputs.items() if name.startswith("state.")}
    return AttentionState(**fields)


@st.composite
def cases(
    draw: st.DrawFn, op: str, lengths: tuple[int, ...] = LENGTHS, rows: tuple[int, ...] = (2, 1), **fixed
) -> Case:
    """A case of this op; ``fixed`` options are not drawn.

    The first of each option's values are those that leave nothing out: Hypothesis begins with them, whatever the number
    of examples.
    """

    def pick(name: str, *values: Any) -> Any:
        return fixed[name] if name in fixed else draw(st.sampled_from(values), label=name)

    b, t, hk, group = pick("B", *rows), pick("T", *lengths), pick("Hk", 2, 1), pick("G", 2, 3, 1)
    k, v, hq = pick("K", 3, 8, 1), pick("V", 5, 8, 1), hk * group
    generator = torch.Generator().manual_seed(pick("seed", *range(50)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens: dict[str, Tensor | None] = {"q": normal(b, t, hq, k), "k": normal(b, t, hk, k), "v": normal(b, t, hk, v)}
    weights: dict[str, Tensor] = {}
    options: dict[str, Any] = {"anchors": pick("anchors", 3, 1, 0)}
    features = k
    if op != "gated":
        options |= {"window": pick("window", 4, 9, 2, 1), "scale": pick("scale", 0.3, None)}
        if pick("sinks", True, False):
            weights["sinks"] = normal(hq, 2) if pick("sinks_a_head", True, False) else normal(3)
            options["sink_form"] = pick("sink_form", "exp", "linear")
            if options["sink_form"] == "linear":  # masses, not their logs
                weights["sinks"] = weights["sinks"].abs()
    if op == "hybrid":
        options |= {name: pick(name, *values) for name, values in HYBRID.items()}
        fp, two_sided = pick("Fp", 4, 5, 1), options["feature_map"] != "identity"
        features = 2 * fp if two_sided else fp
        tokens |= {"fq": normal(b, t, hq, fp) * 2, "fk": normal(b, t, hk, fp) * 2}
        tokens = tokens if two_sided else tokens | {x: tokens[x].abs() for x in ("fq", "fk")}
        options["normalize"] = options["mix"] == "merge" or pick("normalize", True, False)
        weight = pick("weight", "token", "head", None)
        name = "merge_bias" if options["mix"] == "merge" else "alpha"
        if weight == "head":
            weights[name] = normal(hq)
        elif weight == "token":
            tokens[name] = normal(b, t, hq)
    if op == "gated":
        options |= {"window_offset": pick("offset", 5, 1, 0), "normalize": pick("normalize", True, False)}
        options |= {"chunk_size": pick("chunk_size", None, 4), "scale": pick("scale", 2.0, None)}
        tokens |= {x: tokens[x].abs() for x in ("q", "k")} if options["normalize"] else {}
    if op != "window":
        shape = {"token": (1,), "key": (hk,), "query": (hq,), "channel": (hk, features)}
        gate = pick("gate", *GATES)
        decay = pick("decay", 0.5, 0.02, 5.0)
        tokens["g"] = None if gate is None else -decay * normal(b, t, *shape[gate]).abs()
        if gate == "token" and draw(st.booleans()):
            tokens["g"] = tokens["g"].squeeze(-1)
    return Case(op, tokens, weights, options)


HYBRID = {
    "mix": ("merge", "sum"),
    "coverage": ("outside", "all"),
    "feature_map": ("softmax", "exp", "identity"),
    "merge_mass": ("relative", "absolute"),
}
