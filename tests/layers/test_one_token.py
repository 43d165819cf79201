"""A token a row: its gate, features and heads are formed together on a GPU, and are those of the parts themselves."""

import pytest
import torch
from layer_checks import FORMS, inputs, layer

from lizard_layers import read_input, tensors_of

TOGETHER = {"recommended", "kept", "kept_by_head", "received"}  # the forms whose parts one launch forms


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_the_same_together_and_apart(form, monkeypatch):
    made, (x, q, k, v, rope) = layer(form, torch.float32), inputs(8, dtype=torch.float32)

    def piece(a, b):
        return x[:, a:b], q[:, a:b], k[:, a:b], v[:, a:b], tuple(t[:, a:b] for t in rope)

    calls, op = [], read_input.token_heads
    monkeypatch.setattr(read_input, "token_heads", lambda *a, **o: calls.append(1) or op(*a, **o))
    found = []
    for on_gpu in (False, True):
        monkeypatch.setattr(read_input, "on_gpu", lambda x, on_gpu=on_gpu: on_gpu)
        _, state = made(*piece(0, 7), use_state=True)
        assert not calls  # seven tokens go their own way
        o, state = made(*piece(7, 8), state=state, use_state=True)
        found.append([o, *tensors_of(state).values()])
    assert bool(calls) == (form in TOGETHER)
    assert all(map(torch.equal, *found))
    calls.clear()
    if getattr(made, "gate", None) is not None:
        made.gate.register_forward_hook(lambda *_: None)
    made(*piece(7, 8), state=state)
    with torch.enable_grad():
        layer(form, torch.float32)(*piece(7, 8), state=state)
    assert not calls  # who looks at the gate, or records gradients, has the parts
