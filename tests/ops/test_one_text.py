"""The step of one text on a CPU: the numbers of the naive op at every position, with and without what it can do."""

import pytest
import torch

from lizard_ops import AttentionState, chunk_hybrid_attn, naive_hybrid_attn, recurrent_hybrid_attn
from lizard_ops.hybrid_attn import one_text, recurrent

HQ, HK, D, FP, WINDOW, LENGTH = 6, 2, 8, 4, 5, 19
BASE = {"mix": "merge", "coverage": "outside", "feature_map": "softmax", "anchors": 2}
FORMS = {
    "base": ("key", {}),
    "scalar gate": ("scalar", {}),
    "no gate, no anchors": (None, {"anchors": 0}),
    "absolute": ("key", {"merge_mass": "absolute", "feature_scale": 0.3, "softcap": 2.0}),
    "identity": ("key", {"feature_map": "identity", "scale": 0.7}),
    "wide window": ("key", {"anchors": 7}),
}


def make(length: int, gate: str | None, options: dict, dtype: torch.dtype = torch.float64) -> dict:
    draw = torch.Generator().manual_seed(0)
    heads = {"q": (HQ, D), "k": (HK, D), "v": (HK, D), "fq": (HQ, FP), "fk": (HK, FP), "merge_bias": (HQ,)}
    x = {name: torch.randn(1, length, *shape, generator=draw, dtype=dtype) for name, shape in heads.items()}
    if options.get("feature_map") == "identity":
        x |= {name: x[name].abs() for name in ("fq", "fk")}
    width = {None: None, "scalar": 1, "key": HK}[gate]
    g = None if width is None else -torch.rand(1, length, width, generator=draw, dtype=dtype)
    return x | {"g": g}


def part(x: dict, a: int, b: int) -> dict:
    return {name: None if t is None else t[:, a:b] for name, t in x.items()}


@pytest.fixture
def counted(monkeypatch):
    """How many steps were those of one text."""
    calls = []
    monkeypatch.setattr(recurrent, "one_text_step", lambda *a: calls.append(1) or one_text.one_text_step(*a))
    return calls


@torch.no_grad()
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_position_is_that_of_the_naive_op(form, inplace, counted):
    gate, changes = FORMS[form]
    options, x = BASE | changes, make(LENGTH, gate, BASE | changes)
    wanted = naive_hybrid_attn(**x, window=WINDOW, **options)[0]
    state = chunk_hybrid_attn(**part(x, 0, 1), window=WINDOW, **options, output_final_state=True)[1]
    state = AttentionState._make(None if t is None else t.contiguous() for t in state)
    for t in range(1, LENGTH):
        before = AttentionState._make(None if f is None else f.clone() for f in state)
        o, new = recurrent_hybrid_attn(
            **part(x, t, t + 1), window=WINDOW, **options, initial_state=state, output_final_state=True, inplace=inplace
        )
        torch.testing.assert_close(o, wanted[:, t : t + 1])
        after = naive_hybrid_attn(**part(x, 0, t + 1), window=WINDOW, **options, output_final_state=True)[1]
        for now, then, held, true in zip(new, before, state, after, strict=True):
            assert (now is None) == (true is None)
            if now is not None:
                torch.testing.assert_close(now, true)
                assert (now is held) == inplace and (inplace or torch.equal(held, then))
        state = new
    assert len(counted) == LENGTH - 1


@torch.no_grad()
def test_a_gate_that_forgets_everything_leaves_the_window_alone(counted):
    x = make(LENGTH, "key", BASE)
    x["g"][:, 9] = -torch.inf
    x["g"][:, 4:8] = -90.0  # what is left is less than a float32 can say
    x = {name: t.float() for name, t in x.items()}
    wanted = naive_hybrid_attn(**x, window=WINDOW, **BASE)[0]
    state = chunk_hybrid_attn(**part(x, 0, 1), window=WINDOW, **BASE, output_final_state=True)[1]
    for t in range(1, LENGTH):
        o, state = recurrent_hybrid_attn(
            **part(x, t, t + 1), window=WINDOW, **BASE, initial_state=state, output_final_state=True
        )
        torch.testing.assert_close(o, wanted[:, t : t + 1])
    assert len(counted) == LENGTH - 1


def test_other_calls_go_their_own_way(counted):
    x = make(8, "key", BASE)

    def step(x=x, **changes):
        options = BASE | changes
        given = {name: None if t is None else t[:, :7] for name, t in x.items()}
        state = chunk_hybrid_attn(**given, window=WINDOW, **options, output_final_state=True)[1]
        recurrent_hybrid_attn(**part(x, 7, 8), window=WINDOW, **options, initial_state=state)

    step()
    assert len(counted) == 1 and counted.clear() is None
    step({name: t.expand(3, *t.shape[1:]) for name, t in x.items()})
    step(x | {"merge_bias": None}, mix="sum")
    step(coverage="all")
    step(x | {"g": -torch.rand(1, 8, HQ, dtype=torch.float64)})
    step(sinks=torch.randn(HQ, 2, dtype=torch.float64))
    step({name: t.bfloat16() if name not in ("g", "merge_bias") else t.float() for name, t in x.items()})
    step(x | {"q": x["q"].clone().requires_grad_()})
    assert not counted
