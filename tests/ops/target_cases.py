"""The cases that an implementation under test takes, and how the properties run them."""

from __future__ import annotations

import pytest
import torch
from gpu_forms import FORMS, ODD_LENGTHS
from hypothesis import strategies as st
from op_cases import call, cases, state_in


def drawn(op, target, **fixed):
    """Cases that the target takes, in its dtype but on the CPU."""
    if target.interpreted:
        fixed = {"chunk_size": None, "lengths": (1, 17, 19)} | fixed
    if target.form is not None:
        form = FORMS[op][target.form]
        unlike = {name: form[name] for name, value in fixed.items() if form.get(name, value) != value}
        if unlike:
            pytest.skip(f"this form has {unlike}")
        fixed = {"lengths": ODD_LENGTHS} | form | fixed
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
