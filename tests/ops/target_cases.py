"""The cases that an implementation under test takes, and how the properties run them."""

from __future__ import annotations

import pytest
import torch
from gpu_forms import FORMS, INTERPRETED_SIZES, ODD_LENGTHS
from hypothesis import strategies as st
from op_cases import call, cases, state_in


def drawn(op, target, **fixed):
    """Cases that the target takes, in its dtype but on the CPU."""
    if target.impl == "triton":
        fixed = {"sink_form": "exp"} | fixed  # the other is refused
    if target.form is not None:
        form = FORMS[op][target.form]
        unlike = {name: form[name] for name, value in fixed.items() if form.get(name, value) != value}
        if unlike:
            pytest.skip(f"this form has {unlike}")
        fixed = {"lengths": ODD_LENGTHS} | form | (INTERPRETED_SIZES if target.interpreted else {}) | fixed
    return cases(op, **fixed).map(lambda case: case.cast(target.dtype))


def drawn_with_gates(op, target, *gates, **fixed):
    """The same with one of these kinds of gate."""
    if target.form is None:
        return st.sampled_from(gates).flatmap(lambda gate: drawn(op, target, gate=gate, **fixed))
    if FORMS[op][target.form]["gate"] not in gates:
        pytest.skip("this form has no such gate")
    return drawn(op, target, **fixed)


def there(case, target):
    return case.cast(target.dtype, target.device)


def chunk(case, target, state=None, **more):
    return call(case, "chunk", state, impl=target.impl, **more)


def joined(parts, last):
    """Outputs of consecutive segments as those of the whole."""
    return {name: x if "state." in name else torch.cat([part[name] for part in parts], 1) for name, x in last.items()}


def in_segments(case, cuts, step):
    """Run ``step(case, state)`` over the pieces between the cuts, handing the state on."""
    ends, parts, state = [0, *sorted(min(c, case.length) for c in cuts), case.length], [], None
    for a, b in zip(ends[:-1], ends[1:], strict=True):
        parts.append(step(case.part(slice(None), slice(a, b)), state))
        state = state_in(parts[-1])
    return joined(parts, parts[-1])


def rows_of(case, kind):
    """The case with rows of this kind and what says so: "packed" (row 0, with an empty sequence), "padded" or plain."""
    rows, length = case.tokens["q"].shape[:2]
    device = case.tokens["q"].device
    if kind == "packed":
        ends = torch.tensor([0, length // 3, length // 3, length], device=device)
        return case.part(slice(0, 1), slice(None)), {"cu_seqlens": ends}
    if kind == "padded":
        mask = torch.rand(rows, length, generator=torch.Generator().manual_seed(length)) > 0.4
        return case, {"padding_mask": mask.to(device)}
    return case, {}


def past_of(case, sequences):
    """States, apart and as one, of sequences that have seen parts of the case's first row, one nothing and one all."""
    seen = [(case.length, 0, case.length // 2, 2)[n % 4] for n in range(sequences)]
    first = case.part(slice(0, 1), slice(None))
    found = [call(first.part(slice(None), slice(0, n)), "naive") for n in seen]
    fields = [name for name in found[0] if "state." in name]
    return [state_in(x) for x in found], state_in({name: torch.cat([x[name] for x in found]) for name in fields})
