"""A layer's step of one text on a CPU is one op's where its choices are that op's, and the layer's own elsewhere."""

import pytest
import torch
from layer_checks import FORMS, inputs, layer

from lizard_layers import map_state, one_text, tensors_of

AT_ONCE = {"recommended"}  # the forms whose steps are one op's


def begun(made, *given):
    """The state after some tokens, which may be overwritten."""
    return map_state(made(*given, use_state=True)[1], lambda t: t.clone(memory_format=torch.contiguous_format))


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_the_same_at_once_and_apart(form, monkeypatch):
    made, (x, q, k, v, rope) = layer(form), inputs(24, batch=1)
    calls, op = [], one_text.text_step
    monkeypatch.setattr(one_text, "text_step", lambda *a, **o: calls.append(1) or op(*a, **o))

    def piece(a, b):
        return x[:, a:b], q[:, a:b], k[:, a:b], v[:, a:b], tuple(t[:, a:b] for t in rope)

    wanted, after = made(x, q, k, v, rope, use_state=True)
    state, outputs = begun(made, *piece(0, 1)), [made(*piece(0, 1))[0]]
    for t in range(1, 24):
        o, state = made(*piece(t, t + 1), state=state, use_state=True, inplace=True)
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), wanted)
    for name, t in tensors_of(after).items():
        if not name.startswith("kept"):  # whose places are in another order
            torch.testing.assert_close(tensors_of(state)[name], t)
    assert len(calls) == (23 if form in AT_ONCE else 0)


@torch.no_grad()
def test_who_looks_has_the_parts(monkeypatch):
    calls, op = [], one_text.text_step
    monkeypatch.setattr(one_text, "text_step", lambda *a, **o: calls.append(1) or op(*a, **o))
    made, (x, q, k, v, rope) = layer("recommended"), inputs(1, batch=1)
    one = x, q, k, v, rope

    state = begun(made, *one)
    made(*one, state=state, inplace=True)
    assert calls
    calls.clear()
    made(*one, state=state, padding_mask=torch.ones(1, 1, dtype=torch.bool), inplace=True)
    made(*one, state=state)  # a state that stays as it is
    assert not calls
    seen = []
    made.gate.register_forward_hook(lambda *_: seen.append(1))
    state = begun(made, *one)
    seen.clear()
    made(*one, state=state, inplace=True)
    assert seen and not calls
