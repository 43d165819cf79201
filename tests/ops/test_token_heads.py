"""Gate, features and turned heads of a few tokens: the bits of the ops that one launch stands for, and who takes it."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE
from triton.runtime.interpreter import InterpretedFunction

from lizard_ops import gate_and_bias, project_both, rotary_both, token_heads
from lizard_ops.few_tokens import api


def inputs(dtype=torch.float32, batch=3, length=1, hq=4, hk=2, dim=8, features=6, hidden=20, bias=True, one_turn=True):
    torch.manual_seed(0)
    joined = torch.randn(batch, length, (hq + 2 * hk) * dim, device=DEVICE).to(dtype)  # as of one product
    q, k, _ = (t.unflatten(-1, (-1, dim)) for t in joined.split([hq * dim, hk * dim, hk * dim], -1))
    angles = torch.randn(1 if one_turn else batch, length, dim // 2, device=DEVICE).repeat(1, 1, 2)

    def weight(*shape):
        return torch.randn(*shape, device=DEVICE)

    return dict(
        x=weight(batch, length, hidden).to(dtype), q=q, k=k, maps=(weight(1, dim, features), weight(hk, dim, features)),
        rope=(angles.cos(), angles.sin()), gate=(weight(hk, hidden), weight(hk)),
        merge=(weight(hq, hidden), weight(hq) if bias else None),
    )  # fmt: skip


def one_by_one(x, q, k, maps, rope, gate, merge, temperature=1.0, impl="auto"):
    g, bias = gate_and_bias(x, *gate, *merge, temperature=temperature, impl=impl)
    q, k, fq, fk = project_both(q, k, *maps, impl=impl)
    return g, bias, *rotary_both(q, k, *rope, impl=impl), fq, fk


def same(found, wanted):
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@torch.no_grad()
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"dtype": torch.float16, "batch": 2, "length": 3, "one_turn": False},
        {"hq": 3, "hk": 3, "dim": 24, "features": 40, "hidden": 33, "bias": False},
        {"batch": 66, "dim": 4, "features": 5, "hq": 1, "hk": 1},  # two tiles of tokens
    ],
    ids=["decode", "half, several positions", "odd sizes", "two tiles"],
)
def test_the_bits_of_the_ops_in_one_launch(more, monkeypatch):
    given, choices = inputs(**more), {"temperature": 1.5, "impl": "triton"}
    wanted = one_by_one(**given, **choices)
    if DEVICE == "cpu":
        started, run = [], InterpretedFunction.run
        monkeypatch.setattr(
            InterpretedFunction, "run", lambda kernel, *a, **o: (started.append(kernel), run(kernel, *a, **o))
        )
    found = token_heads(**given, **choices)
    assert same(found, wanted)
    if DEVICE == "cpu":
        assert [kernel.fn.__name__ for kernel in started] == ["token_heads_kernel"]
    torch.testing.assert_close(
        found, api.TokenHeads(*one_by_one(**given, temperature=1.5, impl="torch")), rtol=2e-3, atol=2e-3
    )


@torch.no_grad()
def test_biases_of_any_stride_are_read_as_they_are():
    given = inputs()
    (gate_weight, gate_bias), (bias_weight, bias) = given["gate"], given["merge"]
    apart = [torch.stack([t, torch.full_like(t, 9.0)], -1)[..., 0] for t in (gate_bias, bias)]
    strided = given | {"gate": (gate_weight, apart[0]), "merge": (bias_weight, apart[1])}
    wanted = one_by_one(**given, impl="triton")
    assert same(one_by_one(**strided, impl="triton"), wanted) and same(token_heads(**strided, impl="triton"), wanted)


def test_others_go_through_the_ops_themselves(monkeypatch):
    """Gradients, many tokens, maps of different widths, float64 and the CPU."""
    given = inputs()
    monkeypatch.setattr(api, "choose_impl", lambda impl, x, beyond: "triton")
    monkeypatch.setattr("lizard_ops.few_tokens.triton_op.launch", lambda *_: pytest.fail("one launch"))
    doubles = {n: tuple(t.double() for t in x) if isinstance(x, tuple) else x.double() for n, x in given.items()}
    wide = torch.randn(2, 8, 7, device=DEVICE)
    learned = given | {"gate": (given["gate"][0].clone().requires_grad_(), given["gate"][1])}
    others = (learned, doubles, given | {"maps": (given["maps"][0], wide)}, inputs(batch=129, hidden=4, hq=1, hk=1))
    for each in others:
        assert same(token_heads(**each, impl="torch"), one_by_one(**each, impl="torch"))
    assert token_heads(**learned, impl="torch").g.requires_grad


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("x", torch.zeros(3, 2, 20, device=DEVICE), r"x: got shape \(3, 2, 20\)"),
        ("k", torch.zeros(2, 1, 2, 8, device=DEVICE), "k: got shape"),
        ("maps", (torch.zeros(1, 7, 6, device=DEVICE), torch.zeros(2, 8, 6, device=DEVICE)), "query_weight"),
        ("rope", (torch.zeros(1, 1, 6, device=DEVICE),) * 2, "cos"),
        ("gate", (torch.zeros(2, 19, device=DEVICE), torch.zeros(2, device=DEVICE)), "gate_weight"),
        ("temperature", 0.0, "temperature"),
        ("impl", "cuda", "impl"),
    ],
)
def test_what_does_not_fit_is_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        token_heads(**inputs() | {name: value})
