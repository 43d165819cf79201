"""The decode kernel against the reference, in the interpreter without a GPU."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, worst_excess

from lizard_ops import naive_hybrid_attn, recurrent_hybrid_attn

decode = pytest.importorskip("lizard_ops.hybrid_attn.triton.decode")

RECOMMENDED = {"mix": "merge", "coverage": "outside", "feature_map": "softmax"}
B, HQ, HK, D, V, FP, WINDOW, SEEN = 3, 4, 2, 16, 16, 8, 5, (0, 4, 20)


def make(steps, gate, features, options, seed=0):
    """The tokens of three rows that have seen 0, 4 and 20 tokens, packed, then ``steps`` tokens a row."""
    torch.manual_seed(seed)
    past = sum(SEEN)
    shapes = {"q": (HQ, D), "k": (HK, D), "v": (HK, V), "fq": (HQ, FP), "fk": (HK, FP)}
    x = {}
    for name, shape in shapes.items():
        for where, rows in (("past ", (1, past)), ("", (B, steps))):
            t = torch.randn(*rows, *shape)
            x[where + name] = t.abs() if options["feature_map"] == "identity" and name[0] == "f" else t
            if gate and name == "q":
                tail = {"scalar": (1,), "key": (HK,), "query": (HQ,), "channel": (HK, features)}[gate]
                x[where + "g"] = -torch.rand(*rows, *tail)
    return x


def arguments(x, where, options):
    return [x.get(where + name) for name in ("q", "k", "v", "fq", "fk", "g")], options


def past_state(x, options):
    tensors, options = arguments(x, "past ", options)
    ends = torch.tensor([0, *SEEN], device=DEVICE).cumsum(0)
    options = {name: t for name, t in options.items() if name not in ("alpha", "merge_bias")}
    return naive_hybrid_attn(*tensors, WINDOW, cu_seqlens=ends, output_final_state=True, **options)[1]


def naive_steps(x, options):
    tensors, options = arguments(x, "", options)
    o, state = naive_hybrid_attn(
        *tensors, WINDOW, initial_state=past_state(x, options), output_final_state=True, **options
    )
    return {"o": o, **fields_of(state)}


def step(tensors, options, state, inplace=False):
    """One step on the kernel."""
    return recurrent_hybrid_attn(
        *tensors, WINDOW, **options, initial_state=state, output_final_state=True, inplace=inplace, impl="triton"
    )


def kernel_steps(x, options, inplace=False):
    """Every step through the kernel; weights a token are sliced as the tensors are."""
    state = past_state(x, options)
    tensors, options = arguments(x, "", options)
    outputs = []
    for t in range(tensors[0].shape[1]):
        now = {name: w[:, t : t + 1] if torch.is_tensor(w) and w.ndim == 3 else w for name, w in options.items()}
        o, state = step([None if x is None else x[:, t : t + 1] for x in tensors], now, state, inplace)
        outputs.append(o)
    return {"o": torch.cat(outputs, 1), **fields_of(state)}


def fields_of(state):
    return {name: x for name, x in state._asdict().items() if x is not None}


@pytest.mark.parametrize(
    "gate, options, dtype",
    [
        ("key", RECOMMENDED | {"anchors": 2, "merge_bias": (HQ,)}, torch.float32),
        ("scalar", RECOMMENDED | {"anchors": 2, "merge_bias": (B, 7, HQ), "sinks": (HQ, 3)}, torch.float16),
        ("channel", RECOMMENDED | {"merge_mass": "absolute"}, torch.float32),
        ("query", {"coverage": "outside", "alpha": (HQ,), "anchors": 3, "feature_map": "exp"}, torch.float32),
        ("channel", {"coverage": "outside", "feature_map": "exp", "normalize": False}, torch.float32),
        ("channel", {"coverage": "all", "feature_map": "exp", "anchors": 1, "mix": "merge"}, torch.float32),
        (None, {"feature_map": "identity", "sinks": (HQ, 1), "alpha": (B, 7, HQ)}, torch.float32),
        ("key", {"feature_map": "identity", "normalize": False}, torch.float32),
        ("key", RECOMMENDED | {"anchors": 2, "softcap": 1.5}, torch.float32),
    ],
)
def test_steps_match_the_reference(gate, options, dtype):
    torch.manual_seed(1)
    options = {name: torch.randn(w).to(DEVICE) if isinstance(w, tuple) else w for name, w in options.items()}
    features = FP if options["feature_map"] == "identity" else 2 * FP
    x = {name: t.to(DEVICE) for name, t in make(7, gate, features, options).items()}
    with torch.no_grad():
        rounded = {name: t.to(t.dtype if name[-1] == "g" else dtype) for name, t in x.items()}
        exact = naive_steps({name: t.double() for name, t in rounded.items()}, options)
        plain, found = naive_steps(rounded, options), kernel_steps(rounded, options, inplace=True)
    for name, reference in exact.items():
        assert worst_excess(found[name], plain[name], reference, dtype) <= 1, name


def test_hard_reset_in_the_window():
    x = make(7, "key", 2 * FP, RECOMMENDED)
    x["g"][:, 3] = -torch.inf
    x = {name: t.to(DEVICE) for name, t in x.items()}
    found, reference = kernel_steps(x, RECOMMENDED), naive_steps(x, RECOMMENDED)
    for name in ("o", "s", "z"):
        torch.testing.assert_close(found[name], reference[name])


def test_step_in_place_wants_contiguous_state():
    x = {name: t.to(DEVICE) for name, t in make(1, "key", 2 * FP, RECOMMENDED).items()}
    state = past_state(x, RECOMMENDED)
    strided = state._replace(ring_k=state.ring_k.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(ValueError, match="state.ring_k"):
        step(arguments(x, "", {})[0], RECOMMENDED, strided, inplace=True)


def test_operator_is_well_formed():
    x = {name: t.to(DEVICE) for name, t in make(1, "key", 2 * FP, RECOMMENDED).items()}
    state = past_state(x, RECOMMENDED)
    tail = (WINDOW, 0, True, True, True, "softmax", True, D**-0.5, 1.0)
    checks = ("test_schema", "test_faketensor")  # its state changes with every call
    torch.library.opcheck(
        decode.hybrid_decode,
        (*arguments(x, "", {})[0], None, None, *(getattr(state, name) for name in decode.FIELDS), *tail),
        test_utils=checks,
    )


def test_copies_leave_the_state_alone():
    x = {name: t.to(DEVICE) for name, t in make(1, "key", 2 * FP, RECOMMENDED).items()}
    state = past_state(x, RECOMMENDED)
    before = [None if t is None else t.clone() for t in state]
    tensors, _ = arguments(x, "", RECOMMENDED)
    step(tensors, RECOMMENDED, state)
    assert all(a is None if b is None else torch.equal(a, b) for a, b in zip(state, before, strict=True))
