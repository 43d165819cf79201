"""Layers whose scores of keys are read by the kernels, their state overwritten where it lies."""

import pytest
import torch
from layer_checks import inputs, layer

from lizard_layers import map_state, tensors_of

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where kernels run


@pytest.mark.parametrize("form", ["kept", "received_by_each"])
@torch.no_grad()
def test_steps_of_the_kernels_are_those_of_pytorch(form):
    """Two key heads, which with ``received_by_each`` lie among repeated ones; float32."""
    plain, quick = (layer(form, torch.float32, impl=impl).to(DEVICE) for impl in ("torch", "triton"))
    length, start = 11, 6
    *tokens, rope = inputs(length, dtype=torch.float32)
    tokens, rope = [t.to(DEVICE) for t in tokens], tuple(t.to(DEVICE) for t in rope)
    first = (t[:, :start] for t in tokens)
    wanted = plain(*first, tuple(t[:, :start] for t in rope), use_state=True)[1]
    state = map_state(wanted, lambda t: t.clone(memory_format=torch.contiguous_format))
    addresses = {name: t.data_ptr() for name, t in tensors_of(state).items()}
    for t in range(start, length):
        step, turn = [z[:, t : t + 1] for z in tokens], tuple(z[:, t : t + 1] for z in rope)
        o, wanted = plain(*step, turn, wanted, use_state=True)
        found, state = quick(*step, turn, state, use_state=True, inplace=True)
        torch.testing.assert_close(found, o, rtol=2e-5, atol=2e-5)
    assert addresses == {name: t.data_ptr() for name, t in tensors_of(state).items()}
    for name, field in tensors_of(wanted).items():
        torch.testing.assert_close(tensors_of(state)[name], field, rtol=2e-5, atol=2e-5, msg=name)


@pytest.mark.parametrize("form", ["kept", "received"])
def test_what_is_refused_in_place_has_changed_nothing(form):
    made = layer(form)
    *tokens, rope = inputs(7)
    with torch.no_grad():
        state = made(*(t[:, :6] for t in tokens), tuple(t[:, :6] for t in rope), use_state=True)[1]
    state = map_state(state, lambda t: t.clone(memory_format=torch.contiguous_format))
    before = map_state(state, torch.clone)
    with pytest.raises(ValueError, match="inplace: got True, wanted False where gradients are recorded"):
        made(*(t[:, 6:] for t in tokens), tuple(t[:, 6:] for t in rope), state, use_state=True, inplace=True)
    assert all(torch.equal(t, tensors_of(before)[name]) for name, t in tensors_of(state).items())
