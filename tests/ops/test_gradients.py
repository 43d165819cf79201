"""Gradients of the PyTorch paths against finite differences in float64, those of states in and out included."""

from __future__ import annotations

import pytest
import torch
from op_cases import Case, call, cases, state_in
from op_checks import examples

from lizard_ops import AttentionState

CARRIED = ("s", "z", "ring_k", "ring_v", "ring_fk", "ring_g", "anchor_k", "anchor_v")


def differentiable(case: Case, form: str, past: Case):
    """The op as a function of tensors alone, and the tensors: inputs, weights and the carried state's fields."""
    names = list(case.leaves())
    state = state_in(call(past, "naive"))
    fields = [name for name in CARRIED if getattr(state, name) is not None]

    def function(*tensors: torch.Tensor):
        given = dict(zip(names + fields, tensors, strict=True))
        now = case.map(lambda name, _: given[name], weights=True)
        carried = AttentionState(state.position, log_scale=state.log_scale, **{name: given[name] for name in fields})
        found = call(now, form, carried)
        if "state.log_scale" in found:  # sums and their scale mean something together only
            scale = found["state.log_scale"].exp()
            found |= {
                "state.s": found["state.s"] * scale[..., None, None],
                "state.z": found["state.z"] * scale[..., None],
            }
        kept = [x for name, x in found.items() if x.requires_grad and name not in ("log", "state.log_scale")]
        return tuple(kept) + ((found["log"].masked_fill(found["log"] == -torch.inf, 0.0),) if "log" in found else ())

    inputs = [*case.leaves().values(), *(getattr(state, name) for name in fields)]
    return function, [x.detach().clone().requires_grad_() for x in inputs]


FORMS = [(op, form) for op in ("gated", "window", "hybrid") for form in ("chunk", "recurrent", "naive")]


@pytest.mark.parametrize("op, form", [pair for pair in FORMS if pair != ("window", "recurrent")])
def test_gradients_are_those_of_finite_differences(op, form, small_sizes):
    sizes = {"B": 1, "T": 6, "K": 2, "V": 2, "Fp": 2, "window": 2, "offset": 1, "Hk": 1, "G": 2, "decay": 0.5}
    sizes |= {"chunk_size": None}

    @examples(6, cases(op, **sizes))
    def check(case):
        if case.options.get("feature_map") == "identity" or op == "gated" and case.options["normalize"]:
            case = case.map(
                lambda name, x: x.abs() + 0.1 if name in ("fq", "fk") or op == "gated" and name != "g" else x
            )
        case = case.map(lambda name, x: x - 0.1 if name == "g" else x)  # away from 0, which steps must not cross
        function, inputs = differentiable(case, form, past=case.map(lambda _, x: 0.9 * x.flip(1)))
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True, atol=1e-6, rtol=1e-4)


@pytest.fixture
def small_sizes(monkeypatch):
    from lizard_ops.gated_attn import chunk_torch, chunk_torch_tiles

    monkeypatch.setattr(chunk_torch, "HEAD_GATE_CHUNK", 2)
    monkeypatch.setattr(chunk_torch, "CHANNEL_GATE_CHUNK", 2)
    monkeypatch.setattr(chunk_torch_tiles, "SCAN", 2)
