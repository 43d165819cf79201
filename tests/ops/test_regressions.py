"""Faults that kernels of others have had, each as the smallest case that shows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from kernel_checks import worst_excess
from torch.utils._python_dispatch import TorchDispatchMode

from lizard_ops import (
    chunk_gated_attn,
    chunk_hybrid_attn,
    naive_hybrid_attn,
    recurrent_hybrid_attn,
    window_attn,
)

MERGE = {"mix": "merge", "coverage": "outside", "feature_map": "softmax"}


def random(target, *shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(target.device, target.dtype) for shape in shapes]


def hybrid_inputs(target, b=2, t=19, hq=2, hk=1, dim=4, fp=3, seed=0):
    shapes = [(b, t, hq, dim), (b, t, hk, dim), (b, t, hk, dim), (b, t, hq, fp), (b, t, hk, fp)]
    x = random(target, *shapes, seed=seed)
    return [*x, -torch.rand(b, t, hk, generator=torch.Generator().manual_seed(seed)).to(target.device)]


def test_normaliser_sums_over_time_not_heads(target):
    """Values of one average to one in every head, whatever the mass of the others."""
    q, k = (x.abs() for x in random(target, (1, 9, 4, 3), (1, 9, 2, 3)))
    o, _ = chunk_gated_attn(q * torch.tensor([1, 2, 4, 8]).to(q)[:, None], k, torch.ones_like(k), impl=target.impl)
    torch.testing.assert_close(o, torch.ones_like(o))


def test_padding_has_no_part_in_the_normaliser(target):
    q, k, v = (x.abs() for x in random(target, (1, 9, 1, 3), (1, 9, 1, 3), (1, 9, 1, 3)))
    mask = torch.arange(9, device=target.device)[None] >= 4
    padded, _ = chunk_gated_attn(q, k, v, padding_mask=mask, impl=target.impl)
    alone, _ = chunk_gated_attn(q[:, 4:], k[:, 4:], v[:, 4:], impl=target.impl)
    torch.testing.assert_close(padded[:, 4:], alone)
    padded, _ = window_attn(q, k, v, 3, padding_mask=mask, impl=target.impl)
    alone, _ = window_attn(q[:, 4:], k[:, 4:], v[:, 4:], 3, impl=target.impl)
    torch.testing.assert_close(padded[:, 4:], alone)


@pytest.mark.parametrize("channels", [False, True])
def test_later_gates_do_not_reach_earlier_outputs(target, channels):
    q, k, v = (x.abs() for x in random(target, (1, 40, 1, 8), (1, 40, 1, 8), (1, 40, 1, 8)))
    g = torch.full((1, 40, 1, 8) if channels else (1, 40, 1), -0.1, device=target.device)
    early, _ = chunk_gated_attn(q, k, v, g, impl=target.impl)
    for later in (-80.0, -1e4, -torch.inf):
        g = g.clone()
        g[:, 23:] = later
        assert torch.equal(chunk_gated_attn(q, k, v, g, impl=target.impl)[0][:, :23], early[:, :23])


@pytest.mark.parametrize("value", [0.0, -1e-8, -88.8, -1e4, -torch.inf])
@pytest.mark.parametrize("shape", [(1,), (2,), (2, 8)])
def test_no_gate_makes_nan(target, value, shape):
    q, k, v = (x.abs().requires_grad_() for x in random(target, (1, 33, 2, 8), (1, 33, 2, 8), (1, 33, 2, 8)))
    g = torch.full((1, 33, *shape), value, device=target.device, requires_grad=True)
    o, state = chunk_gated_attn(q, k, v, g, output_final_state=True, impl=target.impl)
    grads = torch.autograd.grad(o.sum() + state.s.sum(), (q, k, v, g))
    assert all(x.isfinite().all() for x in (o, state.s, *grads))


def test_odd_dims_read_nothing_beyond_them(any_target):
    """Inputs lie in larger buffers full of NaN."""
    target, inputs = any_target, []
    for x in hybrid_inputs(target, dim=5, fp=3):
        buffer = torch.full((x.shape[0], x.shape[1] + 1, *(n + 3 for n in x.shape[2:])), torch.nan).to(x)
        view = buffer[(slice(None), slice(0, x.shape[1]), *(slice(0, n) for n in x.shape[2:]))]
        view.copy_(x)
        inputs.append(view)
    o, _ = chunk_hybrid_attn(*inputs, 4, anchors=1, **MERGE, impl=target.impl)
    plain, _ = chunk_hybrid_attn(*(x.contiguous() for x in inputs), 4, anchors=1, **MERGE, impl=target.impl)
    if target.device == "cpu":
        assert torch.equal(o, plain)
        return
    # views and contiguous inputs differ in alignment, so these are two compiled kernels, which may round differently
    assert o.isfinite().all()
    own, float32 = (torch.finfo(dtype).eps for dtype in (target.dtype, torch.float32))
    torch.testing.assert_close(o, plain, rtol=own, atol=8 * float32 * plain.abs().max().item())


def test_arguments_are_left_as_they_were(target):
    cu_seqlens = torch.tensor([0, 3, 19], device=target.device)
    mask = torch.rand(2, 19, generator=torch.Generator().manual_seed(0)).to(target.device) > 0.3
    for more in ({"cu_seqlens": cu_seqlens}, {"padding_mask": mask}):
        inputs = [x[:1] if "cu_seqlens" in more else x for x in hybrid_inputs(target)]
        leaves = [x.clone().requires_grad_() for x in inputs]
        _, state = chunk_hybrid_attn(*inputs, 4, **MERGE, output_final_state=True, **more, impl=target.impl)
        kept = [x.clone() for x in (*inputs, *more.values(), *(x for x in state if x is not None))]
        options = {"initial_state": state, "output_final_state": True, "impl": target.impl}
        chunk_hybrid_attn(*leaves, 4, **MERGE, **more, **options)[0].sum().backward()
        now = (*leaves, *more.values(), *(x for x in state if x is not None))
        assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))


def test_decoding_goes_on_where_the_prompt_ended(target):
    """Prompts of different lengths, padded, then steps: window keys, anchors and offsets are all in the state."""
    x = hybrid_inputs(target, t=24)
    lengths = torch.tensor([13, 6], device=target.device)
    mask = torch.arange(16, device=target.device) >= (16 - lengths)[:, None]
    options = {"anchors": 2, "output_final_state": True} | MERGE
    _, state = chunk_hybrid_attn(*(t[:, :16] for t in x), 4, padding_mask=mask, impl=target.impl, **options)
    assert torch.equal(state.position, lengths)
    with torch.no_grad():
        for i in range(16, 24):
            o, state = recurrent_hybrid_attn(*(t[:, i : i + 1] for t in x), 4, initial_state=state, **options)
            for row, length in enumerate(lengths.tolist()):
                own = [t[row : row + 1, 16 - length : i + 1].double().cpu() for t in x]
                whole, _ = naive_hybrid_attn(*own, 4, **options)
                tolerance = 2e-6 if target.dtype == torch.float32 else 1e-9 if target.dtype == torch.float64 else 2e-2
                torch.testing.assert_close(o[row, 0].double().cpu(), whole[0, -1], rtol=tolerance, atol=tolerance)


def test_state_does_not_grow(target):
    sizes = []
    for t in (3, 40):
        _, state = chunk_hybrid_attn(
            *hybrid_inputs(target, t=t), 4, anchors=2, **MERGE, output_final_state=True, impl=target.impl
        )
        sizes.append([x.numel() for x in state if x is not None])
    assert sizes[0] == sizes[1]


def test_each_branch_has_its_own_maximum(target):
    """Linear masses far above or below the window's scores: the merge is still that of float64."""
    for size in (1e-3, 1.0, 30.0):
        *x, g = hybrid_inputs(target, seed=3)
        x = [x[0] * 5, x[1] * 5, x[2], x[3].abs() * size, x[4].abs()]
        options = {"mix": "merge", "coverage": "outside", "merge_mass": "absolute"}
        o, _ = chunk_hybrid_attn(*x, g, 4, **options, impl=target.impl)
        exact, _ = naive_hybrid_attn(*(t.double().cpu() for t in (*x, g)), 4, **options)
        tolerance = 1e-5 if target.dtype in (torch.float32, torch.float64) else 3e-2
        torch.testing.assert_close(o.double().cpu(), exact, rtol=tolerance, atol=tolerance)


def test_large_alpha_does_not_overflow(target):
    x = hybrid_inputs(target)
    x[0], x[1] = x[0] * 50, x[1] * 50
    o, _ = chunk_hybrid_attn(*x, 4, feature_map="exp", alpha=100.0, impl=target.impl)
    exact, _ = naive_hybrid_attn(*(t.double().cpu() for t in x), 4, feature_map="exp", alpha=100.0)
    tolerance = 1e-4 if target.dtype in (torch.float32, torch.float64) else 3e-2  # scores of some hundred roundings
    torch.testing.assert_close(o.double().cpu(), exact, rtol=tolerance, atol=100 * tolerance)


def test_equal_sinks_act_as_one(target):
    q, k, v = random(target, (1, 9, 2, 4), (1, 9, 1, 4), (1, 9, 1, 4))
    four, _ = window_attn(q, k, v, 4, sinks=torch.zeros(4, device=target.device), impl=target.impl)
    one, _ = window_attn(q, k, v, 4, sinks=torch.tensor([4.0], device=target.device).log(), impl=target.impl)
    torch.testing.assert_close(four, one)


def test_printed_sinks_can_lose_the_denominator():
    """t = -1 four times and one key of score 0: 1 - 4 = -3, as the paper prints it; with exp it stays above 1."""
    q, k, v = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 1)
    sinks = torch.full((4,), -1.0)
    assert window_attn(q, k, v, 1, sinks=sinks, sink_form="linear")[0].item() == pytest.approx(-1 / 3)
    assert 0 < window_attn(q, k, v, 1, sinks=sinks)[0].item() < 1


def test_features_and_window_meet_the_short_prompt(target):
    """Up to the window's length a merge outside it is ordinary causal softmax attention."""
    *x, g = hybrid_inputs(target, t=8)
    o, _ = chunk_hybrid_attn(*x, g, 8, **MERGE, impl=target.impl)
    q, k, v = (t.transpose(1, 2).double() for t in x[:3])
    k, v = k.expand_as(q), v.expand_as(q)
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    if target.dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(o, full.to(o.dtype))
    else:  # small outputs keep few digits of weights in half precision, in the reference too
        plain, _ = naive_hybrid_attn(*x, g, 8, **MERGE)
        assert worst_excess(o, plain, full, target.dtype) <= 1


class NoReadBack(TorchDispatchMode):
    """Fails where a tensor's value is read by Python: on a GPU that is a synchronisation."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read back"
        return func(*args, **(kwargs or {}))


def test_forward_and_backward_read_nothing_back(torch_target, monkeypatch):
    """Checks of values apart, which a GPU tensor has in checked mode only."""
    from lizard_ops.common import checks

    monkeypatch.setattr(checks, "may_read", lambda x: False)
    mask = torch.rand(2, 19, generator=torch.Generator().manual_seed(0)) > 0.3
    *x, g = hybrid_inputs(torch_target)
    leaves = [t.requires_grad_() for t in (*x, g)]
    with NoReadBack():
        options = {"anchors": 2, "padding_mask": mask, "output_final_state": True} | MERGE
        o, state = chunk_hybrid_attn(*leaves, 4, **options)
        o, _ = chunk_hybrid_attn(*leaves, 4, initial_state=state, **options)
        o.sum().backward()
        recurrent_hybrid_attn(
            *(t[:, :1] for t in leaves), 4, initial_state=state, output_final_state=True, **MERGE, anchors=2
        )


def test_many_heads_and_rows_fit_the_grid(target):
    """More rows times heads than the 65,535 of a launch grid's second axis."""
    q = torch.ones(33000, 1, 2, 1, device=target.device, dtype=target.dtype)
    assert chunk_gated_attn(q, q, q, impl=target.impl)[0].min() == 1
    assert window_attn(q, q, q, 1, impl=target.impl)[0].min() == 1


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any result had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("channels", [False, True])
def test_training_takes_no_more_than_the_length(torch_target, channels):
    """No tensor of a forward and backward grows with the square of the length."""
    largest = []
    for t in (64, 128, 256):
        *x, g = hybrid_inputs(torch_target, t=t)
        g = g.unsqueeze(-1).expand(*g.shape, 6) if channels else g
        leaves = [y.clone().requires_grad_() for y in (*x, g)]
        with LargestTensor() as mode:
            chunk_hybrid_attn(*leaves, 4, anchors=2, **MERGE, impl=torch_target.impl)[0].sum().backward()
        largest.append(mode.elements)
    assert largest[2] - largest[1] <= 2.1 * (largest[1] - largest[0])


PACKAGES = ("lizard_ops", "lizard_layers", "lizard_models")
SOURCES = [path for name in PACKAGES for path in sorted((Path(__file__).parents[2] / name).rglob("*.py"))]


def test_sources_hold_nothing_of_a_debugging_session():
    """No breakpoints, no anomaly detection, no silent loading, no grid axis with its limit of 65,535 programs."""
    assert len(SOURCES) > 50
    banned = r"breakpoint\(|set_trace\(|detect_anomaly|load_state_dict\([^)]*strict=False|program_id\([12]\)"
    found = {str(path): re.findall(banned, path.read_text()) for path in SOURCES}
    assert not {path: hits for path, hits in found.items() if hits}
