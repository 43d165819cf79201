"""What must hold of every op, implementation and dtype: each route to an answer is the reference's answer.

Every check draws its cases with Hypothesis and judges errors against float64 by those of the reference in the same
dtype (op_checks.judge). ``pytest tests/ops --device cuda`` runs the same checks on the Triton kernels.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gpu_forms import EVERY_LENGTH, FORMS
from hypothesis import strategies as st
from op_cases import call
from op_checks import examples, judge, with_gradients
from target_cases import chunk, drawn, drawn_with_gates, in_segments, past_of, rows_of, there


def test_chunked_is_the_reference(op, every_target):
    lengths = {"lengths": EVERY_LENGTH} if every_target.device == "cuda" else {}

    @examples(every_target.count(60), drawn(op, every_target, **lengths))
    def check(case):
        judge(with_gradients(lambda c: chunk(c, every_target), there(case, every_target)), case, every_target.dtype)


def test_recurrent_is_the_reference(linear_op, torch_target):
    """Rows of every kind. The window op has no step of its own: it is a branch of the hybrid op's."""

    @examples(torch_target.count(25), drawn(linear_op, torch_target), st.sampled_from(["packed", "padded", "plain"]))
    def check(case, kind):
        case, more = rows_of(case, kind)
        found = with_gradients(lambda c: call(c, "recurrent", **more), case)
        judge(found, case, torch_target.dtype, lambda c: call(c, "naive", **more))


def test_segments_with_a_carried_state_are_the_whole(op, any_target):
    places = [0, 2, 5, 70, 130] if any_target.device == "cuda" else [0, 1, 2, 5, 8, 9, 16]
    cuts = st.just([5, 21] if any_target.interpreted else [2, 9, 16]) | st.lists(st.sampled_from(places), max_size=3)

    @examples(any_target.count(40), drawn(op, any_target), cuts)
    def check(case, cuts):
        def run(c):
            return in_segments(c, cuts, lambda part, state: chunk(part, any_target, state))

        judge(with_gradients(run, there(case, any_target)), case, any_target.dtype)


def test_steps_are_the_whole(op, target):
    form = "chunk" if op == "window" else "recurrent"

    @examples(target.count(15), drawn(op, target, lengths=(1, 2, 5, 9)))
    def check(case):
        with torch.no_grad():
            run = in_segments(there(case, target), range(case.length), lambda part, state: call(part, form, state))
        judge(run, case, target.dtype)


def test_packed_is_separate(op, any_target):
    cuts = st.just([3, 3, 14]) | st.lists(st.integers(0, 17), max_size=3)

    @examples(any_target.count(25), drawn(op, any_target, B=1), cuts, st.sampled_from([True, False]))
    def check(case, cuts, carried):
        ends = [0, *sorted(min(c, case.length) for c in cuts), case.length]
        pieces = [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]

        def separate(c):
            pasts = past_of(c, len(pieces))[0] if carried else [None] * len(pieces)
            parts = [
                call(c.part(slice(None), piece), "naive", state) for piece, state in zip(pieces, pasts, strict=True)
            ]
            return {name: torch.cat([x[name] for x in parts], 0 if "state." in name else 1) for name in parts[0]}

        def packed(c):
            before = past_of(c, len(pieces))[1] if carried else None
            return chunk(c, any_target, before, cu_seqlens=torch.tensor(ends, device=any_target.device))

        judge(with_gradients(packed, there(case, any_target)), case, any_target.dtype, separate)


def test_padding_is_not_there(op, any_target):
    sides, pads = st.sampled_from(["mixed", "left", "right"]), st.sampled_from([7, 0, 1, 2])

    @examples(any_target.count(25), drawn(op, any_target, B=2), pads, sides, st.sampled_from([True, False]))
    def check(case, seed, side, carried):
        rows, length = case.tokens["q"].shape[:2]
        if side == "mixed":
            mask = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) > 0.4
        else:
            mask = torch.arange(length) >= torch.tensor([[0], [min(seed + 1, length)]])[:rows]
            mask = mask if side == "left" else mask.flip(1)

        def padded(c):
            before = past_of(c, rows)[1] if carried else None
            c = c.map(lambda _, x: x.masked_fill(~mask.to(x.device).view(rows, length, *[1] * (x.ndim - 2)), torch.nan))
            return chunk(c, any_target, before, padding_mask=mask.to(any_target.device))

        def alone(c):
            pasts = past_of(c, rows)[0] if carried else [None] * rows
            parts = [call(c.part(slice(n, n + 1), mask[n]), "naive", pasts[n]) for n in range(rows)]
            whole = {name: torch.cat([x[name] for x in parts]) for name in parts[0] if "state." in name}
            for name in set(parts[0]) - set(whole):
                fill = 0.0 if name == "o" else -torch.inf
                blank = parts[0][name].new_full((rows, length, *parts[0][name].shape[2:]), fill)
                for n in range(rows):
                    at = torch.full((int(mask[n].sum()),), n), mask[n].nonzero().squeeze(1)
                    blank = blank.index_put(at, parts[n][name][0])
                whole[name] = blank
            return whole

        judge(with_gradients(padded, there(case, any_target)), case, any_target.dtype, alone)


def test_outputs_need_no_final_state(op, any_target):
    """They are the same, and so are their gradients, where none is asked for or nothing is said of it."""
    kinds, flags = st.sampled_from(["padded", "packed", "plain"]), st.sampled_from([True, False])

    @examples(any_target.count(10), drawn(op, any_target, B=2), kinds, flags, st.sampled_from([None, False]))
    def check(case, kind, carried, final):
        case, more = rows_of(case, kind)
        sequences = len(more["cu_seqlens"]) - 1 if kind == "packed" else len(case.tokens["q"])
        there_too = {name: x.to(any_target.device) for name, x in more.items()}

        def run(c, form, **more):
            return call(c, form, past_of(c, sequences)[1] if carried else None, final, **more)

        forms = {"chunk": {"impl": any_target.impl}}
        if any_target.impl == "torch" and op != "window":
            forms["recurrent"] = {}
        for form, impl in forms.items():
            found = with_gradients(partial(run, form=form, **impl, **there_too), there(case, any_target))
            judge(found, case, any_target.dtype, partial(run, form="naive", **more))


def test_the_future_changes_nothing(op, any_target):
    @examples(any_target.count(20), drawn(op, any_target), st.integers(1, 16), st.sampled_from([1.5, 30.0]))
    def check(case, at, factor):
        at = min(at, case.length)

        def later(name, x):
            tail = x[:, at:] * factor if name in ("g", "fq", "fk") else factor - x[:, at:]
            return torch.cat([x[:, :at], tail], 1)

        case = there(case, any_target)
        a, b = chunk(case, any_target), chunk(case.map(later), any_target)
        for name in ("o", "log"):
            if name in a:
                assert torch.equal(a[name][:, :at], b[name][:, :at]), name
        found = with_gradients(lambda c: {"o": chunk(c, any_target)["o"][:, :at]}, case)
        for name in case.tokens:
            if f"d {name}" in found:
                assert not found[f"d {name}"][:, at:].any(), name


def test_later_masks_change_nothing(op, target):
    """Padding from position ``at`` on, and ends of packed sequences there, are nothing to the positions before."""

    @examples(target.count(12), drawn(op, target, B=1), st.integers(1, 16), st.integers(0, 9))
    def check(case, at, seed):
        at, length = min(at, case.length), case.length
        case = there(case, target)

        def before(kind, values, case):
            return {"o": chunk(case, target, **{kind: values})["o"][:, :at]}

        early = torch.rand(1, length, generator=torch.Generator().manual_seed(seed)) > 0.3
        late = early.clone()
        late[:, at:] = ~late[:, at:]
        ends = [torch.tensor(x, device=target.device) for x in ([0, at // 2, length, length], [0, at // 2, at, length])]
        for kind, values in (("padding_mask", [x.to(target.device) for x in (early, late)]), ("cu_seqlens", ends)):
            a, b = (with_gradients(partial(before, kind, x), case) for x in values)
            for name, x in a.items():
                channels = case.tokens.get("g") is not None and case.tokens["g"].ndim == 4
                if target.impl == "triton" and not (channels and case.options.get("feature_map") == "exp"):
                    assert torch.equal(b[name], x), (kind, name)
                elif target.impl == "triton":  # this linear branch is PyTorch's: see below
                    # a gradient may be what is left of larger terms: rounding is judged by the largest tensor
                    largest = max((y.abs().amax().item() for y in a.values() if y.numel()), default=0.0)
                    size = 16 * torch.finfo(x.dtype).eps * largest
                    torch.testing.assert_close(b[name], x, rtol=0, atol=size)
                else:  # where PyTorch's chunks begin depends on the longest sequence
                    torch.testing.assert_close(b[name], x)


def own_gradients(case, target):
    """Of the token tensors, for cotangents that each row makes of its own output."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in case.tokens.items() if x is not None}
    o = chunk(case.map(lambda name, _: leaves[name]), target)["o"]
    found = torch.autograd.grad(o, list(leaves.values()), o.detach().sin(), allow_unused=True)
    return {f"d {name}": d for name, d in zip(leaves, found, strict=True) if d is not None}


def test_a_row_does_not_know_its_batch(op, target):
    @examples(target.count(12), drawn(op, target, B=3))
    def check(case):
        case = there(case, target)
        together = chunk(case, target)
        kernels = target.impl == "triton"  # PyTorch's backward products on a CPU add in an order of the batch's size
        gradients = own_gradients(case, target) if kernels else {}
        for row in range(3):
            part = case.part(slice(row, row + 1), slice(None))
            for name, x in (chunk(part, target) | (own_gradients(part, target) if kernels else {})).items():
                whole = gradients[name] if name in gradients else together[name]
                assert torch.equal(whole[row : row + 1], x), name


def test_permuted_heads_permute_the_output(op, target):
    @examples(target.count(12), drawn(op, target, Hk=2))
    def check(case):
        case = there(case, target)
        heads = {2: torch.tensor([1, 0])}
        q_heads = case.tokens["q"].shape[2]
        heads[q_heads] = torch.arange(q_heads).view(2, -1).flip(0).flatten()

        def permute(name, x):
            axis = 0 if name in case.weights else 2
            size = x.shape[axis] if x.ndim > axis and name != "sinks" or x.ndim == 2 and name == "sinks" else 1
            return (
                x
                if size == 1 or (x.ndim == 2 and name == "g")
                else x[(slice(None),) * axis + (heads[size].to(x.device),)]
            )

        a, b = chunk(case, target), chunk(case.map(permute, weights=True), target)
        torch.testing.assert_close(b["o"], a["o"][:, :, heads[q_heads].to(target.device)])


def test_the_size_of_features_cancels(linear_op, target):
    fixed = {"normalize": True} | ({"mix": "sum", "feature_map": "identity"} if linear_op == "hybrid" else {})

    @examples(target.count(10), drawn(linear_op, target, **fixed))
    def check(case):
        case = there(case, target)
        names = ("q", "k") if linear_op == "gated" else ("fq", "fk")
        scaled = case.map(lambda name, x: x * 4.0 if name in names else x)
        assert torch.equal(chunk(case, target)["o"], chunk(scaled, target)["o"])


def test_absorbed_gates_are_the_same_gates(linear_op, any_target):
    def fixed(feature_map):
        features = {} if linear_op == "gated" else {"feature_map": feature_map}
        return drawn_with_gates(linear_op, any_target, "token", "key", "query", decay=0.5, **features)

    form = {} if any_target.form is None else FORMS[linear_op][any_target.form]
    maps = [form["feature_map"]] if "feature_map" in form else ["identity", "exp"]
    if maps == ["softmax"]:
        pytest.skip("this form's features have no absorbed form")

    @examples(any_target.count(15), fixed(maps[0]) if len(maps) == 1 else st.sampled_from(maps).flatmap(fixed))
    def check(case):
        run = with_gradients(lambda c: chunk(c, any_target, gate_form="absorbed"), there(case, any_target))
        judge(run, case, any_target.dtype)


def test_strided_inputs(op, target):
    @examples(target.count(10), drawn(op, target), st.sampled_from(["transposed", "sliced", "expanded"]))
    def check(case, how):
        case = there(case, target)

        def expanded(name, x):
            return x[:1].expand_as(x)

        def strided(name, x):
            if how == "expanded":
                return expanded(name, x)
            return (
                x.transpose(0, -1).contiguous().transpose(0, -1)
                if how == "transposed"
                else torch.cat([x, x], -1)[..., : x.shape[-1]]
            )

        plain = case.map(expanded) if how == "expanded" else case
        a, b = (
            with_gradients(lambda c: chunk(c, target), c)
            for c in (plain.map(lambda _, x: x.contiguous()), plain.map(strided))
        )
        for name, x in a.items():
            torch.testing.assert_close(b[name], x, rtol=0, atol=0)


def test_the_same_twice(op, target):
    @examples(target.count(6), drawn(op, target))
    def check(case):
        case = there(case, target)
        a, b = (with_gradients(lambda c: chunk(c, target), case) for _ in range(2))
        for name, x in a.items():
            assert torch.equal(x, b[name]), name


def test_memory_is_never_read_before_it_is_written(op, any_target, monkeypatch):
    """Padded rows, one of them empty. A finite leftover shows where a maximum swallows NaN."""

    @examples(any_target.count(10), drawn(op, any_target, B=2))
    def check(case):
        case = there(case, any_target)
        mask = torch.arange(case.length) < torch.tensor([[0], [case.length - 1]])

        def run(c):
            return with_gradients(lambda c: chunk(c, any_target, padding_mask=mask.to(any_target.device)), c)

        clean = run(case)
        for leftover in (torch.nan, -1e30):
            with monkeypatch.context() as patched:
                for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
                    patched.setattr(owner, name, poisoned(getattr(owner, name), leftover))
                found = run(case)
            for name, x in clean.items():
                assert torch.equal(x, found[name]), (name, leftover)


def poisoned(make, leftover):
    def full_of_leftovers(*args, **options):
        x = make(*args, **options)
        if not x.is_floating_point():
            return x
        return x.fill_(leftover if leftover != leftover else max(leftover, torch.finfo(x.dtype).min))

    return full_of_leftovers


def finite(found):
    """No NaN anywhere, and infinities only where they say: no key, no decay left."""
    infinite = ("log", "state.log_scale", "state.ring_g")
    return all(
        (x < torch.inf if name in infinite else x.isfinite()).all()
        for name, x in found.items()
        if "position" not in name
    )


GATE_EXTREMES = {
    "open": [0.0],
    "nearly open": [-1e-8],
    "shut": [-1e4],
    "reset": [-torch.inf],
    "mixed": [0, -1e-8, -0.3, -1e4, -torch.inf],
}


@pytest.mark.parametrize("kind", GATE_EXTREMES)
def test_extreme_gates(linear_op, target, kind):
    @examples(target.count(15), drawn_with_gates(linear_op, target, "channel", "query", "key", "token"))
    def check(case):
        def extreme(name, x):
            which = (x * 1e3).long() % len(GATE_EXTREMES[kind])
            return torch.tensor(GATE_EXTREMES[kind], dtype=x.dtype)[which] if name == "g" else x

        case = case.map(extreme)
        found = with_gradients(lambda c: chunk(c, target), there(case, target))
        assert finite(found)
        found.pop("d g")
        judge(found, case, target.dtype, without=("d g",))


@pytest.mark.parametrize("kind", ["large scores", "equal keys", "zero values", "large features", "zero features"])
def test_extreme_inputs(op, target, kind):
    # among equal keys rounding chooses the largest score, and with it whose gradient a relative mass takes
    fixed = {"equal keys": {"merge_mass": "absolute"}, "large features": {"normalize": True}}.get(kind, {})

    # sinks as masses are held against exp(-largest score), which is no number at such scores
    @examples(target.count(12), drawn(op, target, sink_form="exp", **fixed))
    def check(case):
        maps = case.options.get("feature_map", "identity")

        def extreme(name, x):
            if kind == "large scores" and name in ("q", "k") and op != "gated":
                return x * (12 if target.dtype == torch.float16 else 60)  # the reference's own scores must fit
            if kind == "equal keys" and name in ("k", "fk"):
                return x[:, :1].expand_as(x)
            if kind == "zero values" and name == "v":
                return x * 0
            if kind == "large features" and name in (("q", "k") if op == "gated" else ("fq", "fk")):
                large = {"identity": 30 if target.dtype == torch.float16 else 1e3, "softmax": 5}
                return x + 500 * x[..., :1].abs() if maps == "exp" else x * large[maps]
            if kind == "zero features" and maps == "identity" and name in ("fq", "q"):
                return x * 0 if op == "gated" or name == "fq" else x
            return x

        case = case.map(extreme)
        found = with_gradients(lambda c: chunk(c, target), there(case, target))
        assert finite(found)
        unknown: list[str] = []
        if kind == "large features" and maps == "softmax" and target.dtype == torch.float16:
            # d phi is as large as 1 / mass; where it is beyond float16 the reference, which rounds it, has no number
            reference = with_gradients(lambda c: call(c, "naive"), case)
            unknown = [name for name, x in reference.items() if x.isnan().any()]
            found = {name: x for name, x in found.items() if name not in unknown}
        top = 1.0
        if kind == "large scores" and op != "gated" and case.length:
            top = (case.tokens["q"].abs().max() * case.tokens["k"].abs().max()).item()
        judge(found, case, target.dtype, largest_score=top, without=unknown)
