"""The inputs and options of a call of the window op, and what every form of it checks and normalises first."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.state import AttentionState


class WindowInputs(NamedTuple):
    """The tensors of a call, or of the window branch of a call of the hybrid op."""

    q: Tensor  # [B, T, Hq, K]
    k: Tensor  # [B, T, Hk, K]
    v: Tensor  # [B, T, Hk, V]
    sinks: Tensor | None = None  # as given; once checked [Hq, M]
    initial_state: AttentionState | None = None
    cu_seqlens: Tensor | None = None  # [N + 1]
    padding_mask: Tensor | None = None  # [B, T]
    expiry: Tensor | None = None  # [B, T, Hk] of the hybrid op: the first query that no longer sees each key; with
    # a state [B, P + W + T, Hk] of the rows kept keys | ring | new tokens, counted from the first new query, -1: no key
    kept_rows: Tensor | None = None  # [B, P, Hk] which of these rows stay exact after the last query, -1: none

    def by_token(self) -> dict[str, Tensor | None]:
        """Those with a row per token."""
        return {"q": self.q, "k": self.k, "v": self.v, "expiry": self.expiry}


class WindowOptions(NamedTuple):
    """The choices of a call."""

    window: int
    anchors: int = 0
    sink_form: str = "exp"
    scale: Any = None  # float or None as given, float once checked
    softcap: float | None = None
    output_final_state: bool = False
    kept_keys: int = 0  # of the hybrid op: the most keys that an expiry keeps alive beyond window and anchors


def window_arguments(inputs: WindowInputs, options: WindowOptions) -> tuple[WindowInputs, WindowOptions]:
    """Raise ValueError for what does not fit; return the sinks as [Hq, M] or None and the scale as a float."""
    q, k, v = inputs.q, inputs.k, inputs.v
    checks.check_qkv(q, k, v)
    checks.check_count("window", options.window, 1)
    checks.check_count("anchors", options.anchors, 0)
    sequences, cu_seqlens, mask = checks.check_sequences(q, inputs.cu_seqlens, inputs.padding_mask)
    shapes = checks.window_state_shapes(sequences, k, v, options.window, options.anchors)
    state = checks.check_state(inputs.initial_state, q, shapes)
    sinks = checks.check_sinks(inputs.sinks, q, options.sink_form)
    scale = checks.check_scale("scale", options.scale, q.shape[3] ** -0.5)
    checks.check_softcap(options.softcap)
    inputs = inputs._replace(sinks=sinks, initial_state=state, cu_seqlens=cu_seqlens, padding_mask=mask)
    return inputs, options._replace(scale=scale)
