"""What the ops accept: every wrong argument becomes a ValueError that names it, what came and what was wanted."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lizard_ops.common.state import AttentionState, map_fields

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GATE_FLOATS = (torch.float32, torch.float64)
STATE_DTYPES = {  # of fields that are not of any floating one
    "kept_scores": (torch.float32,), "ring_scores": (torch.float32,), "kept_positions": (torch.int64,),
}  # fmt: skip

_checked: contextvars.ContextVar[bool] = contextvars.ContextVar("lizard_ops_checked", default=False)


@contextlib.contextmanager
def checked(enabled: bool = True) -> Iterator[None]:
    """Inside this context the values of GPU arguments are checked too, at the price of a synchronisation.

    Values are the signs of gates (no log-decay above 0) and the entries of cu_seqlens (from 0, never falling, to T).
    CPU tensors are always checked, except while torch.compile traces.
    """
    token = _checked.set(enabled)
    try:
        yield
    finally:
        _checked.reset(token)


def may_read(x: Tensor) -> bool:
    """Whether the values of x may be looked at: CPU tensors always, others in checked mode, never while tracing.

    Nor where there are none to be seen: on the meta device, in fake tensors and under ``torch.func.vmap``.
    """
    if torch.compiler.is_compiling() or not has_values(x):
        return False
    return x.device.type == "cpu" or _checked.get()


def has_values(x: Tensor) -> bool:
    """Whether x holds numbers of its own, rather than a shape or one row for many."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return False
        x = torch._C._functorch.get_unwrapped(x)
    return not is_shape(x)


def is_shape(x: Tensor) -> bool:
    """Whether x is a shape alone: on the meta device, or fake."""
    return x.device.type == "meta" or isinstance(x, FakeTensor)


def want_values(name: str, x: Tensor, reader: str) -> None:
    """Refuse a tensor without values where this reader must see them."""
    if not torch.compiler.is_compiling():
        want(has_values(x), name, x, f"a tensor with values (not meta, fake or under vmap), which {reader} reads")


def work_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums, states and log-masses: float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def refuse(name: str, came: object, wanted: str) -> NoReturn:
    """Raise the ValueError for an argument that does not fit."""
    shown = f"shape {tuple(came.shape)} {came.dtype} on {came.device}" if isinstance(came, Tensor) else repr(came)
    raise ValueError(f"{name}: got {shown}, wanted {wanted}")


def want(condition: bool, name: str, came: object, wanted: str, *sizes: object) -> None:
    """Refuse the argument unless the condition holds.

    sizes: what the braces in ``wanted`` stand for. Sizes and options may be symbols while torch.compile traces, which
    cannot write one: no message holds them before it is needed.
    """
    if not condition:
        refuse(name, came, wanted.format(*sizes) if sizes else wanted)


def check_tensor(name: str, x: object, shape: Sequence[int], like: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """x is a tensor of this shape and one of these dtypes on the device of ``like``."""
    fits = isinstance(x, Tensor) and tuple(x.shape) == tuple(shape) and x.dtype in dtypes and x.device == like.device
    if not fits:  # torch.compile cannot write a shape whose sizes it does not know
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        refuse(name, x, f"a {kinds} tensor of shape {tuple(shape)} on {like.device}")


def check_count(name: str, n: object, least: int) -> None:
    """n is a Python integer of at least this size."""
    want(isinstance(n, int) and not isinstance(n, bool) and n >= least, name, n, f"an integer >= {least}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """value is one of the named choices."""
    want(value in choices, name, value, "one of " + ", ".join(repr(choice) for choice in choices))


def check_flag(name: str, value: object) -> None:
    """value is True or False."""
    want(isinstance(value, bool), name, value, "True or False")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q [B,T,Hq,K], k [B,T,Hk,K], v [B,T,Hk,V], one dtype and device, Hk divides Hq, dims at least 1."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        want(isinstance(x, Tensor) and x.ndim == 4 and x.dtype in FLOATS, name, x, "a floating tensor [B, T, H, dim]")
    batch, length, q_heads, dim = q.shape
    heads = k.shape[2]
    check_tensor("k", k, (batch, length, heads, dim), q, (q.dtype,))
    check_tensor("v", v, (batch, length, heads, v.shape[3]), q, (q.dtype,))
    there = all(size > 0 for size in (batch, heads, dim, v.shape[3]))  # the least of them would compare an open batch
    want(there, "k and v", tuple(v.shape), "at least one row, head and channel")
    want(q_heads > 0 and q_heads % heads == 0, "q", q, "a number of heads that is a multiple of the {} of k", heads)


def check_softcap(softcap: float | None) -> None:
    """None or a positive finite number."""
    check_scale("softcap", softcap, 1.0)


def check_scale(name: str, scale: float | None, default: float) -> float:
    """The scale as a positive finite float."""
    if scale is None:
        return default
    real = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    want(real and 0 < scale < math.inf, name, scale, "a positive finite number or None")
    return float(scale)


def check_gate(g: Tensor | None, q: Tensor, heads: int, features: int, padding_mask: Tensor | None) -> Tensor | None:
    """The log-decay as [B,T,Hg] with Hg in {1, Hk, Hq} or [B,T,Hk,F], in the work dtype; None stays None."""
    if g is None:
        return None
    batch, length, q_heads, _ = q.shape
    shapes = [(batch, length), *((batch, length, h) for h in sorted({1, heads, q_heads}))]
    shapes.append((batch, length, heads, features))
    fits = isinstance(g, Tensor) and any(tuple(g.shape) == shape for shape in shapes)
    fits = fits and g.dtype in GATE_FLOATS and g.device == q.device
    if not fits:
        refuse("g", g, f"a float32 or float64 tensor of shape {' or '.join(map(str, shapes))} on {q.device}")
    check_gate_values(g, padding_mask)
    return (g.unsqueeze(-1) if g.ndim == 2 else g).to(work_dtype(q))


def check_gate_values(g: Tensor, padding_mask: Tensor | None) -> None:
    """No log-decay of a real token is above 0 or NaN, where the values may be looked at."""
    if may_read(g) and (padding_mask is None or has_values(padding_mask)):
        real = g.detach() if padding_mask is None else g.detach()[padding_mask]
        largest = real.max().item() if real.numel() else 0.0
        want(largest <= 0, "g", largest, "log-decays <= 0, none of them NaN (this is the largest)")


def check_sequences(
    q: Tensor, cu_seqlens: Tensor | None, padding_mask: Tensor | None, name: str = "q"
) -> tuple[int, Tensor | None, Tensor | None]:
    """Check how tokens form sequences; return how many there are, and both tensors, cu_seqlens as kernels read it:
    contiguous. No kernel reads a mask.

    cu_seqlens [N+1] int32 or int64 packs N sequences into one row; padding_mask [B, T] bool is True at real tokens.
    name: of q in the op that asks.
    """
    batch, length = q.shape[:2]
    if padding_mask is not None:
        want(cu_seqlens is None, "padding_mask", padding_mask, "None with cu_seqlens: packed rows hold no padding")
        check_tensor("padding_mask", padding_mask, (batch, length), q, (torch.bool,))
    if cu_seqlens is None:
        return batch, None, padding_mask
    fits = isinstance(cu_seqlens, Tensor) and cu_seqlens.ndim == 1 and cu_seqlens.shape[0] >= 2
    fits = fits and cu_seqlens.dtype in (torch.int32, torch.int64) and cu_seqlens.device == q.device
    want(fits, "cu_seqlens", cu_seqlens, f"an int32 or int64 tensor [N + 1] on {q.device}, N >= 1")
    want(batch == 1, name, q, "one row (B = 1) with cu_seqlens")
    if may_read(cu_seqlens):
        ends = cu_seqlens.tolist()
        rising = all(a <= b for a, b in zip(ends[:-1], ends[1:], strict=True))
        whole = ends[0] == 0 and ends[-1] == length and rising
        want(whole, "cu_seqlens", ends, "0 first, never falling, {} last", length)
    return cu_seqlens.shape[0] - 1, cu_seqlens.contiguous(), None


def check_state(
    state: AttentionState | None, like: Tensor, wanted: dict[str, tuple[int, ...]]
) -> AttentionState | None:
    """The carried state, contiguous, which holds exactly these fields with these shapes on the device of ``like``.

    wanted: shape of each field that this op and these options use, the leading N included; position is implied.
    """
    if state is None:
        return None
    check_state_fields(state, like, wanted)
    check_position_values(state)
    return map_fields(Tensor.contiguous, state)


def check_state_fields(state: AttentionState, like: Tensor, wanted: dict[str, tuple[int, ...]]) -> None:
    """``check_state`` but for what is in the fields."""
    want(isinstance(state, AttentionState), "initial_state", type(state).__name__, "an AttentionState or None")
    sequences = next(iter(wanted.values()))[0]
    check_tensor("initial_state.position", state.position, (sequences,), like, (torch.int64,))
    for name in AttentionState._fields[1:]:
        field = getattr(state, name)
        if name in wanted:
            check_tensor(f"initial_state.{name}", field, wanted[name], like, STATE_DTYPES.get(name, FLOATS))
        else:
            want(field is None, f"initial_state.{name}", field, "None: this op with these options keeps no such field")


def check_position_values(state: AttentionState) -> None:
    """No sequence has seen fewer than 0 tokens, where the values may be looked at."""
    if may_read(state.position) and state.position.numel():
        first = int(state.position.min())
        want(first >= 0, "initial_state.position", first, "tokens seen, >= 0 (this is the smallest)")


def linear_state_shapes(
    n: int, q: Tensor, k_dim: int, v: Tensor, g: Tensor | None, offset: int, features: int, feature_map: str
) -> dict[str, tuple[int, ...]]:
    """Shapes of the state fields of a linear branch, as ``check_state`` wants them.

    k_dim: features as given (pre-activations); features: after expansion; g as ``check_gate`` returns it.
    """
    heads = state_heads(q, v, g)
    shapes: dict[str, tuple[int, ...]] = {"s": (n, heads, features, v.shape[3]), "z": (n, heads, features)}
    if feature_map == "exp":
        shapes["log_scale"] = (n, heads)
    if offset:
        shapes["ring_v"] = (n, offset, v.shape[2], v.shape[3])
        shapes["ring_fk"] = (n, offset, v.shape[2], k_dim)
        if g is not None:
            shapes["ring_g"] = (n, offset, *g.shape[2:])
    return shapes


def window_state_shapes(n: int, k: Tensor, v: Tensor, window: int, anchors: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the state fields of a window branch, as ``check_state`` wants them."""
    shapes: dict[str, tuple[int, ...]] = {
        "ring_k": (n, window, k.shape[2], k.shape[3]),
        "ring_v": (n, window, v.shape[2], v.shape[3]),
    }
    if anchors:
        shapes["anchor_k"] = (n, anchors, k.shape[2], k.shape[3])
        shapes["anchor_v"] = (n, anchors, v.shape[2], v.shape[3])
    return shapes


def kept_state_shapes(
    n: int,
    k: Tensor,
    v: Tensor,
    kept_keys: int | Sequence[int],
    waiting: int,
    k_dim: int,
    g: Tensor | None,
    late: bool,
) -> dict[str, tuple[int, ...]]:
    """Shapes of the state fields of kept keys, as ``check_state`` wants them.

    kept_keys: places of every key head, or of each. late: keys enter the sums when they expire. waiting: scores in the
    ring; k_dim: features as given; g as ``check_gate`` returns it. A gate that the heads share has a sum for each of
    them, since each keeps keys of its own.
    """
    heads = k.shape[2]
    places = (n, kept_keys, heads) if isinstance(kept_keys, int) else (n, sum(kept_keys))
    shapes: dict[str, tuple[int, ...]] = {"kept_k": (*places, k.shape[3]), "kept_v": (*places, v.shape[3])}
    shapes |= {"kept_scores": places, "kept_positions": places, "ring_scores": (n, waiting, heads)}
    if late:
        shapes["kept_fk"] = (*places, k_dim)
        if g is not None and isinstance(kept_keys, int):
            shapes["kept_g"] = (n, kept_keys, max(g.shape[2], heads), *g.shape[3:])
        elif g is not None:
            shapes["kept_g"] = (*places, *g.shape[3:], *([g.shape[2] // heads] if g.shape[2] > heads else []))
    return shapes


def state_heads(q: Tensor, v: Tensor, g: Tensor | None) -> int:
    """Heads of the linear sums: the key heads, or the query heads with a gate per query head."""
    return q.shape[2] if g is not None and g.ndim == 3 and g.shape[2] == q.shape[2] else v.shape[2]


def check_sinks(sinks: Tensor | None, q: Tensor, sink_form: str) -> Tensor | None:
    """Sink logits as [Hq, M]; [M] counts for every head."""
    check_choice("sink_form", sink_form, ("exp", "linear"))
    if sinks is None:
        return None
    heads = q.shape[2]
    fits = isinstance(sinks, Tensor) and sinks.dtype in FLOATS and sinks.device == q.device and sinks.ndim in (1, 2)
    fits = fits and sinks.shape[-1] > 0 and (sinks.ndim == 1 or sinks.shape[0] == heads)
    want(fits, "sinks", sinks, "a floating tensor [M] or [{}, M] on {}, M >= 1", heads, q.device)
    return sinks.expand(heads, -1) if sinks.ndim == 1 else sinks


def check_head_weight(name: str, x: float | Tensor | None, q: Tensor, scalar: bool) -> Tensor | None:
    """A weight per head, as [Hq] or [B,T,Hq]; with ``scalar`` also a number or a tensor without axes."""
    if x is None:
        return None
    heads = q.shape[2]
    if scalar and isinstance(x, (int, float)) and not isinstance(x, bool):
        return torch.full((heads,), float(x), dtype=work_dtype(q), device=q.device)
    shapes = [(heads,), tuple(q.shape[:3]), *([()] if scalar else [])]
    # compared one by one: torch.compile does not find a shape of unknown sizes in a list; and a batch is no number of
    # heads, which an export would make a condition
    shaped = isinstance(x, Tensor) and any(x.ndim == len(shape) and tuple(x.shape) == shape for shape in shapes)
    if not shaped or not isinstance(x, Tensor) or x.dtype not in FLOATS or x.device != q.device:
        shown = " or ".join(map(str, shapes))
        refuse(name, x, f"a floating tensor of shape {shown} on {q.device}" + " or a number" * scalar)
    return x.expand(heads) if x.ndim == 0 else x


def check_gate_form(gate_form: str, g: Tensor | None, feature_map: str) -> None:
    """ "absorbed" needs a gate, one per head or for all heads, and features that a factor does not leave unchanged."""
    check_choice("gate_form", gate_form, ("stable", "absorbed"))
    if gate_form == "absorbed":
        want(g is not None and g.ndim == 3, "gate_form", gate_form, '"stable" without a gate or with one per channel')
        soft = feature_map == "softmax"
        want(not soft, "gate_form", gate_form, '"stable" with feature_map="softmax", which cancels what it absorbs')
