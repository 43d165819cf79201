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
    """Sizes and factors as symbols: messages are not written, both are compared, unless an argument is wrong."""
    from lizard_ops.gated_attn.arguments import GatedInputs, GatedOptions, gated_arguments
    from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions, hybrid_arguments

    case = one_of(cases(op, B=2, T=9, Hk=2, **fixed)).cast(torch.float32)

    def check(q, k, v, g, fq, fk, merge_bias, scale):
        if op == "gated":
            return q * gated_arguments(GatedInputs(q, k, v, g), GatedOptions(scale))[1].scale
        inputs = HybridInputs(q, k, v, fq, fk, g, merge_bias=merge_bias)
        options = HybridOptions(4, mix="merge", coverage="outside", feature_map="softmax", scale=scale, softcap=scale)
        return q * hybrid_arguments(inputs, options)[1].scale

    torch.compiler.reset()
    compiled = torch.compile(check, fullgraph=True, dynamic=True, backend="aot_eager")
    given = [case.tokens.get(name) for name in ("q", "k", "v", "g", "fq", "fk")] + [case.weights.get("merge_bias")]
    given.append(0.3)
    torch.testing.assert_close(compiled(*given), check(*given))


class Unwritable(int):
    """A size or an option as torch.compile holds it: a number that counts and compares, and that no string can hold."""

    def refuse(self, *_):
        raise AssertionError("a number is written where nothing is refused")

    __str__ = __repr__ = __format__ = refuse


class Sized(torch.Tensor):
    """A tensor whose sizes are such numbers; what is computed of it is a plain one."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def shape(self):
        with torch._C.DisableTorchFunctionSubclass():
            return tuple(Unwritable(n) for n in self.size())


@pytest.mark.parametrize("name", ["packed", "padded", "kept", "expiring", "channel", "merge"])
def test_no_check_writes_a_number_unless_it_refuses(name):
    """torch 2.11 breaks its graph where an option or a size that it does not know becomes part of a string."""

    def sized(*shape):
        return torch.rand(*shape).as_subclass(Sized)

    batch, length, window = 1 if name == "packed" else 2, 9, Unwritable(4)
    q, k, v, fq, fk = (sized(batch, length, heads, 6) for heads in (4, 2, 2, 4, 2))
    g = -sized(batch, length, 2, *([12] if name == "channel" else []))
    rows, more = {}, {"feature_map": "exp", "coverage": "outside"}
    if name == "packed":
        rows = {"cu_seqlens": torch.tensor([0, 4, length]).as_subclass(Sized)}
    elif name == "padded":
        rows = {"padding_mask": (torch.arange(length) > torch.tensor([[0], [2]])).as_subclass(Sized)}
    elif name == "kept":
        more |= {"scores": sized(batch, length, 2), "score_delay": Unwritable(1), "kept_keys": Unwritable(2)}
    elif name == "expiring":
        ends = (torch.arange(length) + 4).view(1, -1, 1).expand(batch, -1, 2).as_subclass(Sized)
        more |= {"expiry": ends, "kept_keys": Unwritable(2)}
    elif name == "merge":
        more |= {"mix": "merge", "merge_bias": sized(4), "sinks": sized(4, 2), "scale": 0.5, "softcap": 3.0}
    final = name not in ("padded", "expiring")
    op = lizard_ops.chunk_hybrid_attn
    some = {"anchors": Unwritable(1), "output_final_state": final} | rows
    o, state = op(q, k, v, fq, fk, g, window, **some, **more)
    if final:
        state = state._replace(**{n: x.as_subclass(Sized) for n, x in state._asdict().items() if x is not None})
        op(q, k, v, fq, fk, g, window, initial_state=state, **some, **more)
    lizard_ops.window_attn(q, k, v, window, sinks=sized(4, 2), **some)
    lizard_ops.key_expiry(sized(batch, length, 2), window, Unwritable(1), Unwritable(2), **rows)
    if name != "channel":
        lizard_ops.chunk_gated_attn(q, k, v, g, window_offset=window, chunk_size=Unwritable(16), **some)
    lizard_ops.project_heads(q, sized(2, 6, 3))
    lizard_ops.apply_rotary(q, sized(1, length, 6), sized(1, length, 6))
    lizard_ops.row_losses(sized(5, 7).clone(), sized(5, 7), torch.zeros(5, dtype=torch.int64), 1.0, 0.5)


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
