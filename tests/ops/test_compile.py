"""The PyTorch paths under torch.compile(fullgraph=True): one graph, so no value is read back, and the same numbers."""

from __future__ import annotations

import pytest
import torch
from op_cases import call, cases
from op_checks import examples, one_of

import lizard_ops

RECOMMENDED = {"mix": "merge", "coverage": "outside", "feature_map": "softmax", "weight": "head", "gate": "key"}


@pytest.mark.parametrize(
    "op, form, fixed",
    [
        ("gated", "chunk", {"gate": "key"}),
        ("gated", "chunk", {"gate": "channel", "offset": 5}),
        ("window", "chunk", {"sinks": True, "anchors": 3}),
        ("hybrid", "chunk", RECOMMENDED),
        ("hybrid", "chunk", {"mix": "sum", "feature_map": "exp", "coverage": "all"}),
        ("hybrid", "recurrent", RECOMMENDED),
    ],
)
def test_compiles_to_one_graph(op, form, fixed):
    @examples(1, cases(op, B=2, T=9 if form == "chunk" else 1, **fixed))
    def check(case):
        case = case.cast(torch.float32)
        mask = torch.tensor([[True], [False]]) | (torch.arange(case.length) < 7)

        def run(tokens, weights):
            case.tokens.update(tokens)
            case.weights.update(weights)
            return call(case, form, padding_mask=mask)

        torch.compiler.reset()
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        leaves = {name: None if x is None else x.clone().requires_grad_() for name, x in case.tokens.items()}
        weights = {name: x.clone().requires_grad_() for name, x in case.weights.items()}
        plain, found = run(leaves, weights), compiled(leaves, weights)
        inputs = [x for x in (*leaves.values(), *weights.values()) if x is not None]
        plain_d, found_d = (torch.autograd.grad(y["o"].sum(), inputs, allow_unused=True) for y in (plain, found))
        for a, b in ((list(plain.values()), list(found.values())), (plain_d, found_d)):
            for x, y in zip(a, b, strict=True):
                if x is not None:
                    torch.testing.assert_close(y, x)


@pytest.mark.parametrize("op, fixed", [("gated", {"gate": "key", "normalize": True}), ("hybrid", RECOMMENDED)])
def test_checks_of_arguments_compile_at_sizes_that_are_not_known(op, fixed):
    """Sizes as symbols: messages are not written, shapes are compared, unless an argument is wrong."""
    from lizard_ops.gated_attn.arguments import GatedInputs, GatedOptions, gated_arguments
    from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions, hybrid_arguments

    case = one_of(cases(op, B=2, T=9, Hk=2, **fixed)).cast(torch.float32)

    def check(q, k, v, g, fq, fk, merge_bias):
        if op == "gated":
            return q * gated_arguments(GatedInputs(q, k, v, g), GatedOptions())[1].scale
        inputs = HybridInputs(q, k, v, fq, fk, g, merge_bias=merge_bias)
        options = HybridOptions(window=4, mix="merge", coverage="outside", feature_map="softmax")
        return q * hybrid_arguments(inputs, options)[1].scale

    torch.compiler.reset()
    compiled = torch.compile(check, fullgraph=True, dynamic=True, backend="aot_eager")
    given = [case.tokens.get(name) for name in ("q", "k", "v", "g", "fq", "fk")] + [case.weights.get("merge_bias")]
    torch.testing.assert_close(compiled(*given), check(*given))


def turned(x, shared):
    return lizard_ops.apply_rotary(x["q"], *(x[f"{name} {shared}"] for name in ("cos", "sin")))


SIZED = {
    "apply_rotary of positions": lambda x: turned(x, "of positions"),
    "apply_rotary of rows": lambda x: turned(x, "of rows"),
    "apply_rotary of all": lambda x: turned(x, "of all"),
    "project_heads": lambda x: lizard_ops.project_heads(x["q"], x["weight"])[1],
    "row_losses": lambda x: lizard_ops.row_losses(
        x["q"].flatten(0, 2), x["q"].flatten(0, 2).cos(), x["targets"], 1.0, 0.5
    ),
    "window_attn": lambda x: lizard_ops.window_attn(x["q"], x["k"], x["v"], 3)[0],
    "chunk_gated_attn": lambda x: lizard_ops.chunk_gated_attn(x["q"], x["k"], x["v"], x["g"])[0],
    "chunk_hybrid_attn": lambda x: lizard_ops.chunk_hybrid_attn(x["q"], x["k"], x["v"], x["q"], x["k"], x["g"], 3)[0],
}


@pytest.mark.parametrize("name", SIZED)
def test_one_function_compiles_for_two_lengths_and_batches(name):
    """What was constant in the first call is a symbol in the second, which every check must bear."""

    def tensors(batch, length):
        x = {"q": torch.rand(batch, length, 4, 4), "g": -torch.rand(batch, length, 2), "weight": torch.rand(2, 4, 3)}
        x |= {name: torch.rand(batch, length, 2, 4) for name in ("k", "v")}
        shapes = {"of positions": (1, length), "of rows": (batch, 1), "of all": (batch, length)}
        turns = {f"{name} {of}": torch.rand(*shape, 4) for of, shape in shapes.items() for name in ("cos", "sin")}
        return x | turns | {"targets": torch.zeros(batch * length * 4, dtype=torch.int64)}

    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    op = SIZED[name]
    compiled = torch.compile(op, fullgraph=True, backend=backend)
    sizes = [(2, 9), (3, 31), (4, 40)] if len(name) < 30 and name[0] in "apr" else [(2, 9), (3, 31)]
    for batch, length in sizes:
        x = tensors(batch, length)
        torch.testing.assert_close(compiled(x), op(x))
    assert len(graphs) == 2
