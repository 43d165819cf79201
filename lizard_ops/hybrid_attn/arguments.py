"""The inputs and options of a call of the hybrid op, and what every form of it checks and normalises first."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.features import FEATURE_MAPS, feature_dim
from lizard_ops.common.pages import check_pool
from lizard_ops.common.places import checked_places, most
from lizard_ops.common.state import AttentionState
from lizard_ops.gated_attn.arguments import GatedInputs, GatedOptions
from lizard_ops.key_expiry.arguments import ExpiryOptions, ExpiryState
from lizard_ops.window_attn.arguments import WindowInputs, WindowOptions

PLACES = "a number with expiry, None without (or a number with scores, or 0)"  # what kept_keys is


class HybridInputs(NamedTuple):
    """The tensors of a call. ``linear`` and ``local`` are those of either branch."""

    q: Tensor  # [B, T, Hq, K]
    k: Tensor  # [B, T, Hk, K]
    v: Tensor  # [B, T, Hk, V]
    fq: Tensor  # [B, T, Hq, Fp]
    fk: Tensor  # [B, T, Hk, Fp]
    g: Tensor | None = None  # as given; once checked [B, T, Hg] or [B, T, Hk, F]
    sinks: Tensor | None = None  # as given; once checked [Hq, M]
    alpha: Any = None  # a number too as given; once checked [Hq], [B, T, Hq] or None
    merge_bias: Tensor | None = None  # [Hq] or [B, T, Hq]
    initial_state: AttentionState | None = None
    cu_seqlens: Tensor | None = None  # [N + 1]
    padding_mask: Tensor | None = None  # [B, T]
    expiry: Tensor | None = None  # [B, T, Hk] int64
    scores: Tensor | None = None  # [B, T, Hk] as given; once checked float32
    kept_rows: Tensor | None = None  # [B, P, Hk] once scores have become expiries: see ``WindowInputs``
    state_indices: Tensor | None = None  # [N] the pages of ``initial_state``, which is a pool then
    has_state: Tensor | None = None  # [N] bool, whether there is a state in them yet

    @property
    def weight(self) -> Tensor | None:
        """alpha of a sum, merge_bias of a merge: [Hq] or [B, T, Hq]."""
        return self.merge_bias if self.alpha is None else self.alpha

    @property
    def linear(self) -> GatedInputs:
        """The linear branch's but for the expiry: see ``linear_inputs``."""
        return GatedInputs(
            q=self.fq, k=self.fk, v=self.v, g=self.g, initial_state=self.initial_state, cu_seqlens=self.cu_seqlens,
            padding_mask=self.padding_mask,
        )  # fmt: skip

    @property
    def local(self) -> WindowInputs:
        """The window branch's."""
        return WindowInputs(
            q=self.q, k=self.k, v=self.v, sinks=self.sinks, initial_state=self.initial_state,
            cu_seqlens=self.cu_seqlens, padding_mask=self.padding_mask, expiry=self.expiry, kept_rows=self.kept_rows,
        )  # fmt: skip

    def by_token(self) -> dict[str, Tensor | None]:
        """Those with a row per token."""
        rows = {"q": self.q, "k": self.k, "v": self.v, "fq": self.fq, "fk": self.fk, "g": self.g}
        rows |= {"expiry": self.expiry, "scores": self.scores}
        weights = {"alpha": self.alpha, "merge_bias": self.merge_bias}
        return rows | {name: x for name, x in weights.items() if x is not None and x.ndim == 3}

    def tensors(self) -> list[Tensor]:
        """All of them, the carried state's included."""
        return [x for x in (*self, *(self.initial_state or ())) if isinstance(x, Tensor)]


class HybridOptions(NamedTuple):
    """The choices of a call. ``linear`` and ``local`` are those of either branch."""

    window: int
    anchors: int = 0
    sink_form: str = "exp"
    mix: str = "sum"
    merge_mass: str = "relative"
    coverage: str = "all"
    feature_map: str = "identity"
    normalize: bool = True
    scale: Any = None  # float or None as given, float once checked
    softcap: float | None = None
    feature_scale: Any = None  # the same
    output_final_state: bool = False
    gate_form: str = "stable"
    inplace: bool = False
    kept_keys: Any = None  # with an expiry, or scores: a number or one per key head, ``Places`` once checked
    score_delay: int = 0

    @property
    def outside(self) -> bool:
        """Whether the linear branch covers only keys that the window leaves out."""
        return self.coverage != "all"

    @property
    def late(self) -> bool:
        """Whether keys that outlive the window enter the linear branch when they expire, not when they leave it."""
        return self.coverage == "outside"

    @property
    def offset(self) -> int:
        """How many of the newest keys the linear branch leaves out."""
        return self.window if self.outside else 0

    @property
    def linear(self) -> GatedOptions:
        """The linear branch's."""
        return GatedOptions(
            scale=self.feature_scale, normalize=self.normalize, window_offset=self.offset, anchors=self.anchors,
            output_final_state=self.output_final_state, feature_map=self.feature_map, gate_form=self.gate_form,
        )  # fmt: skip

    @property
    def local(self) -> WindowOptions:
        """The window branch's."""
        return WindowOptions(
            window=self.window, anchors=self.anchors, sink_form=self.sink_form, scale=self.scale, softcap=self.softcap,
            output_final_state=self.output_final_state, kept_keys=most(self.kept_keys),
        )  # fmt: skip


def linear_inputs(inputs: HybridInputs, options: HybridOptions) -> GatedInputs:
    """The linear branch's, where it covers what is not exact, with the expiries that say so."""
    if not options.outside or inputs.expiry is None:
        return inputs.linear
    if options.late:
        return inputs.linear._replace(expiry=inputs.expiry, kept_rows=inputs.kept_rows)
    return inputs.linear._replace(expiry=leavings(inputs, options.window), initial_state=without_kept(inputs))


def leavings(inputs: HybridInputs, window: int) -> Tensor:
    """What expiries would be if no key outlived the window, of ring and new rows alone; -1 for what is no key."""
    expiry, state = inputs.expiry, inputs.initial_state
    assert expiry is not None
    if state is not None and state.kept_positions is not None:
        expiry = expiry.narrow(-2, state.kept_positions.shape[-2], expiry.shape[-2] - state.kept_positions.shape[-2])
    rows, new = expiry.shape[-2], inputs.v.shape[-3]
    leaves = torch.arange(rows, device=expiry.device).unsqueeze(-1) + (new - rows + window)
    return torch.where(expiry < 0, -1, leaves)


def without_kept(inputs: HybridInputs) -> AttentionState | None:
    """The carried state as the linear branch sees it where kept keys are among its sums already."""
    state = inputs.initial_state
    return None if state is None else state._replace(kept_k=None, kept_v=None, kept_positions=None)


def kept_places(inputs: HybridInputs, options: HybridOptions) -> int:
    """How many keys of a head, of that which has most, the scores keep exact beyond window and anchors; 0 without."""
    return 0 if inputs.scores is None else most(options.kept_keys)


def expiry_options(options: HybridOptions) -> ExpiryOptions:
    """Those of the key expiry of scores, for which a key stands where its score does, later by score_delay."""
    delay = options.score_delay
    return ExpiryOptions(options.window - delay, options.anchors + delay, options.kept_keys, options.output_final_state)


def scored_state_shapes(inputs: HybridInputs, options: HybridOptions, n: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the state fields that a call with scores has beyond one without; g as ``check_gate`` returns it."""
    q, k, v, g, waiting = inputs.q, inputs.k, inputs.v, inputs.g, options.window - options.score_delay
    shapes = checks.kept_state_shapes(n, k, v, options.kept_keys, waiting, inputs.fk.shape[3], g, options.late)
    return shapes | ({"log_scale": (n, checks.state_heads(q, v, g))} if options.outside else {})


def scored_state(state: AttentionState | None, options: HybridOptions) -> ExpiryState | None:
    """The carried state of the scores, whose positions are those of ``scores``: later by the delay than their keys'."""
    if state is None or state.kept_positions is None:
        return None
    assert state.kept_scores is not None and state.ring_scores is not None
    held = state.kept_positions
    arrived = torch.where(held < 0, -1, held + options.score_delay)
    return ExpiryState(state.position, state.kept_scores, arrived, state.ring_scores)


def places_of(inputs: HybridInputs, options: HybridOptions) -> Any:
    """kept_keys as ``Places``: with scores one of them at least, with an expiry any number or None, else None or 0."""
    kept_keys, heads = options.kept_keys, inputs.v.shape[2]
    if inputs.scores is not None:
        checks.want(kept_keys is not None, "kept_keys", kept_keys, "a number >= 1 with scores")
        return checked_places(kept_keys, heads, 1)
    if inputs.expiry is not None and kept_keys is not None:
        return checked_places(kept_keys, heads, 0)
    checks.want(kept_keys in (None, 0), "kept_keys", kept_keys, PLACES)
    return kept_keys


def check_scores(inputs: HybridInputs, options: HybridOptions) -> Tensor | None:
    """Scores [B, T, Hk] as float32 without a graph, and what comes with them."""
    scores, v, delay, mask = inputs.scores, inputs.v, options.score_delay, inputs.padding_mask
    checks.check_count("score_delay", delay, 0)
    checks.want(delay < options.window, "score_delay", delay, "less than the window, {}", options.window)
    if scores is None:
        return None
    checks.check_tensor("scores", scores, v.shape[:3], v, checks.FLOATS)
    checks.want(inputs.expiry is None, "expiry", inputs.expiry, "None with scores, which say when keys expire")
    checks.want(options.gate_form != "absorbed", "gate_form", options.gate_form, '"stable" with scores')
    if checks.may_read(scores) and (mask is None or checks.has_values(mask)):
        real = scores.detach() if mask is None else scores.detach()[mask]
        unordered = int(real.isnan().sum())
        checks.want(not unordered, "scores", unordered, "scores that are not NaN (this many are)")
    return scores.detach().float()


def check_kept_positions(state: AttentionState | None, window: int) -> None:
    """Kept keys have left the window."""
    if state is None or state.kept_positions is None or not checks.may_read(state.kept_positions):
        return
    held = state.kept_positions
    left = (state.position - window).view(-1, *[1] * (held.ndim - 1))  # places of a head of its own lie in one list
    inside = int(((held >= 0) & (held >= left)).sum())
    wanted = "keys that have left the window (this many have not)"
    checks.want(not inside, "initial_state.kept_positions", inside, wanted)


def check_expiry(inputs: HybridInputs, options: HybridOptions) -> None:
    """Expiries [B, T, Hk] of keys that are no anchors are at or behind the end of the window."""
    expiry, v, mask, ends = inputs.expiry, inputs.v, inputs.padding_mask, inputs.cu_seqlens
    if expiry is None:
        return
    checks.check_tensor("expiry", expiry, v.shape[:3], v, (torch.int64,))
    state, final = inputs.initial_state, options.output_final_state
    checks.want(state is None, "initial_state", type(state).__name__, "None with expiry; scores carry a state")
    checks.want(not final, "output_final_state", final, "False with expiry; scores leave a state")
    checks.want(options.gate_form != "absorbed", "gate_form", options.gate_form, '"stable" with expiry')
    if not checks.may_read(expiry) or not all(x is None or checks.has_values(x) for x in (mask, ends)):
        return
    at = torch.arange(v.shape[1], device=v.device).expand(v.shape[:2])
    if mask is not None:
        at = mask.cumsum(1) - 1
    if ends is not None:
        at = at - ends[torch.searchsorted(ends, at.contiguous(), right=True) - 1]
    real = (at >= options.anchors) if mask is None else (at >= options.anchors) & mask
    early = int((real.unsqueeze(-1) & (expiry < (at + options.window).unsqueeze(-1))).sum())
    checks.want(not early, "expiry", early, "positions from that of the key + window on (this many are earlier)")


def pool_or_rows(inputs: HybridInputs, sequences: int) -> int:
    """How many rows the fields of the state have: a pool's pages, or a row a sequence."""
    state, indices, has = inputs.initial_state, inputs.state_indices, inputs.has_state
    if indices is None or state is None:
        checks.want(indices is None, "initial_state", None, "a pool of states with state_indices")
        checks.want(has is None, "has_state", has, "None without state_indices")
        return sequences
    check_pool(state, indices, has, sequences)
    return state.position.shape[0]


def hybrid_arguments(inputs: HybridInputs, options: HybridOptions) -> tuple[HybridInputs, HybridOptions]:
    """Raise ValueError for what does not fit; return what has several spellings in one."""
    q, k, v, fq, fk = inputs.q, inputs.k, inputs.v, inputs.fq, inputs.fk
    mix, normalize = options.mix, options.normalize
    checks.check_qkv(q, k, v)
    checks.check_choice("feature_map", options.feature_map, FEATURE_MAPS)
    checks.check_choice("mix", mix, ("sum", "merge"))
    checks.check_choice("merge_mass", options.merge_mass, ("relative", "absolute"))
    checks.check_choice("coverage", options.coverage, ("all", "outside", "left"))
    checks.check_flag("normalize", normalize)
    checks.check_count("window", options.window, 1)
    checks.check_count("anchors", options.anchors, 0)
    checks.want(mix == "sum" or normalize, "normalize", normalize, 'True with mix="merge": it weighs two averages')
    sums = mix == "sum"
    checks.want(sums or inputs.alpha is None, "alpha", inputs.alpha, 'None with mix="merge"; its weight is merge_bias')
    bias = inputs.merge_bias
    checks.want(mix == "merge" or bias is None, "merge_bias", bias, 'None with mix="sum"; use alpha')
    for name, x, heads in (("fq", fq, q.shape[2]), ("fk", fk, k.shape[2])):
        fits = isinstance(x, Tensor) and x.ndim == 4 and x.shape[3] > 0
        checks.want(fits, name, x, "a floating tensor [B, T, {}, Fp]", heads)
        checks.check_tensor(name, x, (*q.shape[:2], heads, fq.shape[3]), q, checks.FLOATS)
    checks.want(fk.dtype == fq.dtype, "fk", fk, f"the dtype of fq, {fq.dtype}")
    features = feature_dim(fk.shape[3], options.feature_map)
    sequences, cu_seqlens, mask = checks.check_sequences(q, inputs.cu_seqlens, inputs.padding_mask)
    g = checks.check_gate(inputs.g, q, k.shape[2], features, inputs.padding_mask)
    n = pool_or_rows(inputs, sequences)
    shapes = checks.window_state_shapes(n, k, v, options.window, options.anchors)
    shapes |= checks.linear_state_shapes(
        n, q, fk.shape[3], v, g, options.offset, features, options.feature_map
    )  # fmt: skip
    options = options._replace(kept_keys=places_of(inputs, options))
    scores = check_scores(inputs, options)
    if scores is not None:
        shapes |= scored_state_shapes(inputs._replace(g=g), options, n)
    state = inputs.initial_state
    if inputs.state_indices is not None and state is not None:  # most pages may hold anything
        checks.check_state_fields(state, q, shapes)
    else:
        state = checks.check_state(state, q, shapes)
        check_kept_positions(state, options.window)
    inputs = inputs._replace(
        g=g,
        sinks=checks.check_sinks(inputs.sinks, q, options.sink_form),
        alpha=checks.check_head_weight("alpha", inputs.alpha, q, scalar=True),
        merge_bias=checks.check_head_weight("merge_bias", bias, q, scalar=False),
        initial_state=inputs.initial_state if options.inplace else state,  # what is overwritten is the caller's own
        cu_seqlens=cu_seqlens,
        padding_mask=mask,
        scores=scores,
    )
    options = options._replace(
        scale=checks.check_scale("scale", options.scale, q.shape[3] ** -0.5),
        feature_scale=checks.check_scale("feature_scale", options.feature_scale, 1.0 if normalize else features**-0.5),
    )
    check_expiry(inputs, options)
    checks.check_softcap(options.softcap)
    checks.check_gate_form(options.gate_form, g, options.feature_map)
    checks.check_flag("inplace", options.inplace)
    return inputs, options
