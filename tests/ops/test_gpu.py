"""What only a GPU shows: real head dims, groups, long rows, graphs, compiled graphs, synchronisation, huge tensors."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import torch.utils.checkpoint
from gpu_forms import FORMS
from op_cases import call, cases, state_in
from op_checks import judge, one_of, with_gradients

from lizard_ops import chunk_gated_attn, chunk_hybrid_attn, recurrent_hybrid_attn, window_attn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MERGE = {"mix": "merge", "coverage": "outside", "feature_map": "softmax", "merge_mass": "relative", "weight": "head"}
SUM = {"mix": "sum", "coverage": "all", "feature_map": "softmax", "merge_mass": "absolute", "weight": "head"}
GATED = {"normalize": True, "offset": 0, "anchors": 0, "decay": 0.02}
WINDOW = {"window": 33, "anchors": 3, "sinks": True, "sinks_a_head": True}
PRACTICE = {
    "gated-key": ("gated", GATED | {"gate": "key"}),
    "gated-channel": ("gated", GATED | {"gate": "channel"}),
    "window": ("window", WINDOW),
    "merge": ("hybrid", MERGE | WINDOW | {"gate": "key", "decay": 0.02}),
    "sum": ("hybrid", SUM | WINDOW | {"gate": "key", "decay": 0.02, "normalize": True}),
    "merge-exp": ("hybrid", MERGE | WINDOW | {"gate": "key", "decay": 0.02, "feature_map": "exp"}),
}
COMPOSED = {
    "merge-channel": ("hybrid", MERGE | WINDOW | {"gate": "channel", "decay": 0.02}),
}
DIMS = [
    (80, 1, BF16),
    (80, 1, FP32),
    (96, 3, BF16),
    (96, 3, FP16),
    (128, 4, BF16),
    (128, 6, BF16),
    (256, 8, BF16),
    (256, 2, FP16),
]


def on_gpu(case, dtype):
    return case.cast(dtype, "cuda")


def chunk(case, **more):
    return call(case, "chunk", impl="triton", **more)


def one_case(name, **sizes):
    """A drawn case of a form of PRACTICE or COMPOSED."""
    op, options = (PRACTICE | COMPOSED)[name]
    sizes = {"B": 1, "Hk": 1, "G": 2, "K": 64, "V": 64, "Fp": 32, "scale": None, "chunk_size": None} | sizes
    return one_of(cases(op, **(sizes | options)))


def check_errors(case, dtype):
    case = case.cast(dtype)
    judge(with_gradients(chunk, on_gpu(case, dtype)), case, dtype)


@pytest.mark.parametrize("dim, group, dtype", DIMS, ids=str)
@pytest.mark.parametrize("name", PRACTICE)
def test_head_dims_and_groups(name, dim, group, dtype):
    """Every output and gradient at the head dims of real models, over more than two chunks."""
    check_errors(one_case(name, T=131, K=dim, V=dim, Fp=min(dim // 2, 64), G=group), dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", COMPOSED)
def test_composed_forms_at_a_real_head_dim(name, dtype):
    check_errors(one_case(name, T=131, K=96, V=96, Fp=48), dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("name", ["window", "merge", "sum"])
def test_capped_scores_at_a_real_head_dim(name, dtype):
    case = one_case(name, T=131, K=128, V=128)
    check_errors(dataclasses.replace(case, options=case.options | {"softcap": 1.5}), dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("k, v", [(136, 16), (16, 136)])
@pytest.mark.parametrize("name", ["gated-key", "gated-channel"])
def test_one_of_keys_and_values_spans_several_blocks(name, k, v, dtype):
    check_errors(one_case(name, T=70, K=k, V=v), dtype)


@pytest.mark.parametrize("name", ["sum", "merge"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_gate_gradients_over_many_chunks(name, dtype):
    check_errors(one_case(name, T=517, G=4, K=64, V=64), dtype)


WIDE = [(name, window, dtype) for name in ("window", "merge") for window in (512, 1024) for dtype in (BF16, FP16)]
WIDE += [(name, window, FP32) for name in ("window", "merge") for window in (512, 1024)]


@pytest.mark.parametrize("name, window, dtype", WIDE, ids=str)
def test_wide_windows(name, window, dtype):
    """As wide as ``linearize --widen`` makes them, over rows of more than two windows."""
    case = one_case(name, T=2 * window + 77, G=3)
    check_errors(dataclasses.replace(case, options=case.options | {"window": window}), dtype)


KEPT = MERGE | {"Hk": 3, "G": 2, "K": 64, "V": 64, "Fp": 32, "window": 128, "anchors": 4, "gate": "key", "decay": 0.02}
KEPT |= {"B": 1, "T": 5000, "sinks": False, "scale": None, "chunk_size": None}
THOUSANDS = [
    ("left", BF16, (2048, 64, 4096), None),
    ("left", FP32, (4096, 2048, 0), 4400),
    ("left", FP16, 4096, None),
    ("outside", BF16, 2048, 4400),
    ("outside", FP32, (4096, 16, 2048), None),
]


@pytest.mark.xdist_group("huge")  # the reference takes some GiB
@pytest.mark.parametrize("coverage, dtype, places, cut", THOUSANDS, ids=str)
def test_thousands_of_kept_keys(coverage, dtype, places, cut):
    """Outputs and every gradient, in one pass and through a state, beside PyTorch's in float64 and in this dtype."""
    case = one_of(cases("hybrid", **(KEPT | {"coverage": coverage})))
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(1, case.length, 3, generator=draw) + torch.arange(case.length).view(1, -1, 1) / 2048
    more = {"kept_keys": places, "score_delay": 2, "final": False}  # of several thousand some are displaced, some stay

    def whole(c, **form):
        c.tokens["scores"] = scores.to(c.tokens["q"].device)
        return call(c, "chunk", **more | form)

    def in_pieces(c):
        c.tokens["scores"] = scores.to(c.tokens["q"].device)
        first = chunk(c.part(slice(None), slice(0, cut)), **more | {"final": True})
        second = call(c.part(slice(None), slice(cut, None)), "chunk", state_in(first), impl="triton", **more)
        return {"o": torch.cat([first["o"], second["o"]], 1)}

    def reference(c):
        found = whole(c.map(lambda _, x: x.cuda(), weights=True), impl="torch")
        return {name: x.cpu() for name, x in found.items()}

    fast = in_pieces if cut else functools.partial(whole, impl="triton")
    judge(with_gradients(fast, on_gpu(case, dtype)), case.cast(dtype), dtype, reference)


@pytest.mark.parametrize("form", ["carried", "packed", "padded"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", ["window", "merge", "sum"])
def test_rows_of_every_kind_at_head_dim_256(name, dtype, form):
    case = one_case(name, T=97, B=1, K=256, V=256, Fp=64).cast(dtype)
    ends, mask = torch.tensor([0, 40, 40, 97]), (torch.arange(97) > 12)[None]

    def fast(case):
        if form == "packed":
            return chunk(case, cu_seqlens=ends.cuda())
        if form == "padded":
            return chunk(case, padding_mask=mask.cuda())
        first = chunk(case.part(slice(None), slice(0, 40)))
        second = call(case.part(slice(None), slice(40, 97)), "chunk", state_in(first), impl="triton")
        return {x: y if "state." in x else torch.cat([first[x], y], 1) for x, y in second.items()}

    options = {"packed": {"cu_seqlens": ends}, "padded": {"padding_mask": mask}}.get(form, {})
    judge(with_gradients(fast, on_gpu(case, dtype)), case, dtype, lambda c: call(c, "naive", **options))


LONG = {"T": 2065, "B": 2, "Hk": 2, "G": 4}


@pytest.mark.parametrize("name", PRACTICE | COMPOSED)
def test_long_rows_are_deterministic_and_alone(name):
    """Output, state and every gradient: the same bits in every run, and in every batch."""
    case = on_gpu(one_case(name, **LONG), BF16)

    def of(case, rows):
        part = case.part(rows, slice(None))
        leaves = {n: x.clone().requires_grad_() for n, x in part.tokens.items() if x is not None}
        outputs = chunk(part.map(lambda n, _: leaves[n]))
        loss = (outputs["o"].double() * outputs["o"].detach().double().sin()).sum()
        return {n: x for n, x in outputs.items() if x is not None} | dict(
            zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)
        )

    first, again, alone = (of(case, slice(n, 2)) for n in (0, 0, 1))
    for n, x in first.items():
        assert torch.equal(x, again[n]), n
        assert torch.equal(x[1:], alone[n]), n


@pytest.mark.parametrize("name", PRACTICE | COMPOSED)
def test_forward_and_backward_never_wait_for_the_gpu(name):
    case = on_gpu(one_case(name, T=131, B=2, Hk=2), BF16)
    mask = (torch.arange(131) > torch.tensor([[12], [0]])).cuda()
    with_gradients(lambda c: chunk(c, padding_mask=mask), case)  # compiles
    leaves = [x.requires_grad_() for x in case.leaves().values()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        o = chunk(case, padding_mask=mask)["o"]
        torch.autograd.grad(o, leaves, torch.ones_like(o), allow_unused=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", PRACTICE | COMPOSED)
def test_captured_in_a_cuda_graph(name):
    """Forward and backward, replayed on new inputs."""
    case, other = (on_gpu(one_case(name, T=131, B=2, Hk=2, seed=seed), BF16) for seed in (1, 2))
    leaves, fresh = list(case.leaves().values()), list(other.leaves().values())
    for x in leaves:
        x.requires_grad_()

    def run():
        o = chunk(case)["o"]
        return o, *(x for x in torch.autograd.grad(o.float().square().sum(), leaves, allow_unused=True))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for x, y in zip(leaves, fresh, strict=True):
            x.copy_(y)
    graph.replay()
    replayed = [None if x is None else x.clone() for x in captured]
    for a, b in zip(replayed, run(), strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", PRACTICE | COMPOSED)
def test_compiles_to_one_graph(name, dynamic):
    case = on_gpu(one_case(name, T=131, B=2, Hk=2), BF16)
    names = list(case.leaves())

    def attend(*tensors):
        given = dict(zip(names, tensors, strict=True))
        return chunk(case.map(lambda n, _: given[n], weights=True))["o"]

    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic)
    # what PyTorch does around the kernels may be fused and round elsewhere, so it is judged as the eager call is
    found = with_gradients(lambda c: {"o": compiled(*(c.leaves()[n] for n in names))}, case)
    judge(found, case.cast(BF16), BF16, lambda c: {"o": call(c, "naive")["o"]})


@pytest.mark.parametrize("name", PRACTICE | COMPOSED)
def test_checkpoints_and_autocasts(name):
    case = on_gpu(one_case(name, T=70, B=2, Hk=2), FP32)
    leaves = {n: x.requires_grad_() for n, x in case.leaves().items()}
    inputs = list(leaves.values())

    def attend(*tensors):
        given = dict(zip(leaves, tensors, strict=True))
        return chunk(case.map(lambda n, _: given[n], weights=True))["o"]

    def gradients(op):
        o = op(*inputs)
        return [o, *torch.autograd.grad(o.float().square().sum(), inputs, allow_unused=True)]

    def same(a, b):
        return all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))

    checkpointed = functools.partial(torch.utils.checkpoint.checkpoint, attend, use_reentrant=False)
    assert same(gradients(attend), gradients(checkpointed))
    for dtype in (BF16, FP16):
        with torch.autocast("cuda", dtype):
            mixed = gradients(attend)
            assert same(mixed, gradients(checkpointed))
        assert mixed[0].dtype == dtype
        assert all(d is None or d.dtype == FP32 for d in mixed[1:])
        plain = chunk(case.map(lambda n, x, dtype=dtype: x if n in UNCAST else x.detach().to(dtype)))["o"]
        assert torch.equal(mixed[0], plain)


UNCAST = ("g", "alpha", "merge_bias")


def test_a_decode_step_in_a_cuda_graph_goes_on_by_itself():
    """The state is updated where it lies, the position too: replays are steps."""
    case = on_gpu(one_case("merge", T=60, B=3, Hk=2, sinks=False), BF16)
    options = {x: case.options[x] for x in ("anchors", "mix", "merge_mass", "coverage", "feature_map", "normalize")}
    options |= {"merge_bias": case.weights["merge_bias"], "scale": 0.125}
    options |= {"output_final_state": True, "impl": "triton"}
    names, window = ("q", "k", "v", "fq", "fk", "g"), case.options["window"]
    with torch.no_grad():
        start = state_in(chunk(case.part(slice(None), slice(0, 40))))
        state = start._make(None if x is None else x.clone() for x in start)
        token = [case.tokens[n][:, 40:41].clone() for n in names]
        recurrent_hybrid_attn(*token, window, **options, initial_state=start)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o, _ = recurrent_hybrid_attn(*token, window, **options, initial_state=state, inplace=True)
        for name, x in start._asdict().items():
            if x is not None:
                getattr(state, name).copy_(x)
        for t in range(40, 60):
            for x, n in zip(token, names, strict=True):
                x.copy_(case.tokens[n][:, t : t + 1])
            graph.replay()
            wanted, start = recurrent_hybrid_attn(
                *(case.tokens[n][:, t : t + 1] for n in names), window, **options, initial_state=start
            )
            assert torch.equal(o, wanted), t
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(state, start, strict=True))


def test_decode_steps_of_every_form():
    """Steps on the decode kernel after a prompt on the chunk kernels, for the forms that stay in Triton and others."""
    for name, form in FORMS["hybrid"].items():
        for dtype in (BF16, FP16):
            sizes = {x: form[x] for x in form if x not in ("decay",)} | {"B": 2, "T": 24}
            case = one_of(cases("hybrid", **sizes)).cast(dtype)

            def steps(case):
                with torch.no_grad():
                    parts = [chunk(case.part(slice(None), slice(0, 15)))]
                    for t in range(15, 24):
                        part = case.part(slice(None), slice(t, t + 1))
                        parts.append(call(part, "recurrent", state_in(parts[-1]), impl="triton"))
                return parts[-1] | {"o": torch.cat([x["o"] for x in parts], 1)}

            try:
                judge(steps(on_gpu(case, dtype)), case, dtype)
            except AssertionError as error:
                raise AssertionError(f"{name} in {dtype}") from error


@pytest.mark.parametrize("name", PRACTICE | COMPOSED)
def test_more_rows_than_a_grid_axis_counts(name):
    """70,000 rows, where an axis other than the first ends at 65,535."""
    case = on_gpu(one_case(name, T=3, B=2, K=16, V=16, Fp=8), BF16)
    many = case.map(lambda _, x: x.repeat(35_000, *[1] * (x.ndim - 1)))
    found, few = with_gradients_of_ones(many), with_gradients_of_ones(case)
    for x, y in zip(found, few, strict=True):
        assert torch.equal(x.unflatten(0, (35_000, 2)), y.expand(35_000, *y.shape))


def with_gradients_of_ones(case):
    leaves = {n: x.detach().clone().requires_grad_() for n, x in case.tokens.items() if x is not None}
    o = chunk(case.map(lambda n, _: leaves[n]))["o"]
    found = torch.autograd.grad(o, list(leaves.values()), torch.ones_like(o), allow_unused=True)
    return [o.detach(), *(d for d in found if d is not None)]


@pytest.mark.xdist_group("huge")  # one after another: each takes about 30 GiB
@pytest.mark.parametrize("op", ["gated", "window", "hybrid"])
def test_more_elements_than_an_int32_counts(op):
    """B T H K beyond 2 ** 31: output and gradients of the last row are those of a small batch, bit for bit."""
    b, t, h, dim = 2, 2**20, 16, 72
    q = torch.rand(b, t, h, dim, device="cuda", dtype=BF16)
    inputs = [q, q[:, :, :1].clone(), torch.rand(b, t, 1, 16, device="cuda", dtype=BF16)]
    assert q.numel() > 2**31
    del q

    def run(rows):
        leaves = [x[rows].detach().requires_grad_() for x in inputs]
        if op == "gated":
            o = chunk_gated_attn(*leaves)[0]
        elif op == "window":
            o = window_attn(*leaves, 64)[0]
        else:
            features = [x[..., :16] for x in leaves[:2]]
            o = chunk_hybrid_attn(*leaves, *features, None, 64)[0]
        return o.detach(), *torch.autograd.grad(o, leaves, torch.ones_like(o))

    whole = [x[1:].clone() for x in run(slice(0, 2))]
    for found, wanted in zip(whole, run(slice(1, 2)), strict=True):
        assert torch.equal(found, wanted)
    del inputs[:], whole, found, wanted  # the worker's other tests share the GPU with 13 more
    torch.cuda.empty_cache()
