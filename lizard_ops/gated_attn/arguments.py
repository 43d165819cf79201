"""The inputs and options of a call of the gated op, and what every form of it checks and normalises first."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.state import AttentionState


class GatedInputs(NamedTuple):
    """The tensors of a call; the linear branch of the hybrid op has them too, with pre-activations for q and k."""

    q: Tensor  # [B, T, Hq, K]
    k: Tensor  # [B, T, Hk, K]
    v: Tensor  # [B, T, Hk, V]
    g: Tensor | None = None  # as given; once checked [B, T, Hg] or [B, T, Hk, F]
    initial_state: AttentionState | None = None
    cu_seqlens: Tensor | None = None  # [N + 1]
    padding_mask: Tensor | None = None  # [B, T]
    expiry: Tensor | None = None  # [B, T, Hk] of the hybrid op: the first query whose sums hold each key; with a
    # state [B, P + W + T, Hk] of the rows kept keys | ring | new tokens, counted from the first new query, -1: no key
    kept_rows: Tensor | None = None  # [B, P, Hk] which of these rows stay exact after the last query, -1: none

    def by_token(self) -> dict[str, Tensor | None]:
        """Those with a row per token."""
        return {"q": self.q, "k": self.k, "v": self.v, "g": self.g, "expiry": self.expiry}


class GatedOptions(NamedTuple):
    """The choices of a call."""

    scale: Any = None  # float or None as given, float once checked
    normalize: bool = True
    window_offset: int = 0
    anchors: int = 0
    output_final_state: bool = False
    feature_map: str = "identity"  # of the hybrid op's linear branch, whose q and k are pre-activations
    gate_form: str = "stable"
    chunk_size: int | None = None


def gated_arguments(inputs: GatedInputs, options: GatedOptions) -> tuple[GatedInputs, GatedOptions]:
    """Raise ValueError for what does not fit; return the gate as [B,T,Hg] or [B,T,Hk,K] and the scale as a float."""
    q, k, v = inputs.q, inputs.k, inputs.v
    checks.check_qkv(q, k, v)
    checks.check_flag("normalize", options.normalize)
    checks.check_count("window_offset", options.window_offset, 0)
    checks.check_count("anchors", options.anchors, 0)
    sequences, cu_seqlens, mask = checks.check_sequences(q, inputs.cu_seqlens, inputs.padding_mask)
    g = checks.check_gate(inputs.g, q, k.shape[2], k.shape[3], inputs.padding_mask)
    shapes = checks.linear_state_shapes(sequences, q, k.shape[3], v, g, options.window_offset, k.shape[3], "identity")
    state = checks.check_state(inputs.initial_state, q, shapes)
    scale = checks.check_scale("scale", options.scale, 1.0 if options.normalize else k.shape[3] ** -0.5)
    checks.check_gate_form(options.gate_form, g, "identity")
    if options.chunk_size is not None:
        checks.check_count("chunk_size", options.chunk_size, 1)
    inputs = inputs._replace(g=g, initial_state=state, cu_seqlens=cu_seqlens, padding_mask=mask)
    return inputs, options._replace(scale=scale)
