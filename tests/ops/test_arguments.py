"""Bad input: a ValueError that names the argument."""

from __future__ import annotations

import threading

import pytest
import torch

import lizard_ops
from lizard_ops import AttentionState, checked

B, T, HQ, HK, K, V, F = 2, 6, 4, 2, 3, 5, 4


def tensors(op):
    x = {"q": torch.rand(B, T, HQ, K), "k": torch.rand(B, T, HK, K), "v": torch.rand(B, T, HK, V)}
    if op == "hybrid":
        x |= {"fq": torch.rand(B, T, HQ, F), "fk": torch.rand(B, T, HK, F)}
    if op != "window":
        x["g"] = -torch.rand(B, T, HK)
    return x | ({} if op == "gated" else {"window": 3})


FORMS = {
    "gated": ("chunk_gated_attn", "recurrent_gated_attn", "naive_gated_attn"),
    "window": ("window_attn", "naive_window_attn"),
    "hybrid": ("chunk_hybrid_attn", "recurrent_hybrid_attn", "naive_hybrid_attn"),
}
EVERY = ("gated", "window", "hybrid")
LINEAR = ("gated", "hybrid")
STATE = AttentionState(torch.zeros(B, dtype=torch.int64))
ONE_ROW = {"q": torch.rand(1, T, HQ, K), "k": torch.rand(1, T, HK, K), "v": torch.rand(1, T, HK, V)}
ONE_ROW_LINEAR = ONE_ROW | {"g": None}
ONE_ROW_HYBRID = ONE_ROW_LINEAR | {"fq": torch.rand(1, T, HQ, F), "fk": torch.rand(1, T, HK, F)}

BAD = [
    # ops, changed arguments, what the message starts with
    (EVERY, {"q": torch.rand(B, T, K)}, "q: got shape"),
    (EVERY, {"k": torch.rand(B, T, K)}, "k: got"),
    (EVERY, {"v": torch.rand(B, T, HK, V, 1)}, "v: got"),
    (EVERY, {"q": [1.0]}, "q: got"),
    (EVERY, {"q": torch.ones(B, T, HQ, K, dtype=torch.int64)}, "q: got"),
    (EVERY, {"q": torch.rand(B, T, 3, K)}, "q: got"),
    (EVERY, {"k": torch.rand(B, T, HK, K + 1)}, "k: got"),
    (EVERY, {"k": torch.rand(B, T, HK, K).double()}, "k: got"),
    (EVERY, {"k": torch.rand(B, T + 1, HK, K)}, "k: got"),
    (EVERY, {"v": torch.rand(B, T, HQ, V)}, "v: got"),
    (EVERY, {"v": torch.rand(B, T, HK, V).bfloat16()}, "v: got"),
    (EVERY, {"k": torch.rand(B, T, HK, K, device="meta")}, "k: got"),
    (EVERY, {"v": torch.rand(B, T, HK, V, device="meta")}, "v: got"),
    (LINEAR, {"g": -torch.rand(B, T, HK, device="meta")}, "g: got"),
    (("window", "hybrid"), {"sinks": torch.rand(3, device="meta")}, "sinks: got"),
    (("hybrid",), {"fq": torch.rand(B, T, HQ, F, device="meta")}, "fq: got"),
    (("hybrid",), {"fq": torch.rand(B, T, HQ, 0), "fk": torch.rand(B, T, HK, 0)}, "fq: got"),
    (("hybrid",), {"alpha": torch.rand(HQ, device="meta")}, "alpha: got"),
    (("hybrid",), {"alpha": "1"}, "alpha: got '1'"),
    (EVERY, {"padding_mask": torch.ones(B, T, device="meta").bool()}, "padding_mask: got"),
    (EVERY, {"initial_state": STATE._replace(position=STATE.position.to("meta"))}, "initial_state.position: got"),
    (EVERY, {"initial_state": STATE._replace(position=STATE.position[:1])}, "initial_state.position: got"),
    (EVERY, {"v": torch.rand(B, T, HK, 0)}, "k and v: got"),
    (LINEAR, {"g": -torch.rand(B, T, HK).bfloat16()}, "g: got"),
    (LINEAR, {"g": -torch.rand(B, T, 3)}, "g: got"),
    (LINEAR, {"g": -torch.rand(B, T, HK, 2)}, "g: got"),
    (LINEAR, {"g": torch.rand(B, T, HK)}, "g: got 0."),
    (LINEAR, {"g": torch.full((B, T), torch.nan)}, "g: got nan"),
    (LINEAR, {"normalize": 1}, "normalize: got 1"),
    (EVERY, {"scale": 0.0}, "scale: got 0.0"),
    (EVERY, {"scale": torch.nan}, "scale: got nan"),
    (EVERY, {"anchors": -1}, "anchors: got -1"),
    (EVERY, {"anchors": 1.0}, "anchors: got 1.0"),
    (("gated",), {"window_offset": -2}, "window_offset: got -2"),
    (("window", "hybrid"), {"window": 0}, "window: got 0"),
    (("window", "hybrid"), {"sinks": torch.rand(3, 2)}, "sinks: got"),
    (("window", "hybrid"), {"sinks": torch.rand(0)}, "sinks: got"),
    (("window", "hybrid"), {"sinks": torch.ones(2, dtype=torch.int32)}, "sinks: got"),
    (("window", "hybrid"), {"sink_form": "none"}, "sink_form: got 'none'"),
    (EVERY, {"padding_mask": torch.ones(B, T)}, "padding_mask: got"),
    (EVERY, {"padding_mask": torch.ones(B, T + 1, dtype=torch.bool)}, "padding_mask: got"),
    (EVERY, {"cu_seqlens": torch.tensor([0, T])}, "q: got"),
    (EVERY, {"cu_seqlens": torch.tensor([0.0, T])}, "cu_seqlens: got"),
    (EVERY, {"cu_seqlens": torch.tensor([T])}, "cu_seqlens: got"),
    (EVERY, {"cu_seqlens": torch.tensor([0, T]), "padding_mask": torch.ones(B, T).bool()}, "padding_mask: got"),
    *(
        ((op,), row | {"cu_seqlens": torch.tensor(ends)}, f"cu_seqlens: got {ends}")
        for op, row in (("window", ONE_ROW), ("gated", ONE_ROW_LINEAR), ("hybrid", ONE_ROW_HYBRID))
        for ends in ([1, T], [0, 4, 2, T], [0, T + 1], [0, T - 1])
    ),
    (("window",), ONE_ROW | {"cu_seqlens": torch.tensor([0, T], device="meta")}, "cu_seqlens: got"),
    (EVERY, {"initial_state": torch.zeros(B)}, "initial_state: got 'Tensor'"),
    (EVERY, {"initial_state": STATE._replace(position=torch.zeros(B))}, "initial_state.position: got"),
    (LINEAR, {"initial_state": STATE}, "initial_state."),
    (("window",), {"initial_state": STATE._replace(ring_k=torch.zeros(B, 4, HK, K))}, "initial_state.ring_k"),
    (("hybrid",), {"fq": torch.rand(B, T, HK, F)}, "fq: got"),
    (("hybrid",), {"fk": torch.rand(B, T, HK, F + 1)}, "fk: got"),
    (("hybrid",), {"fk": torch.rand(B, T, HK, F).double()}, "fk: got"),
    (("hybrid",), {"mix": "mean"}, "mix: got 'mean'"),
    (("hybrid",), {"merge_mass": "exact"}, "merge_mass: got 'exact'"),
    (("hybrid",), {"coverage": "inside"}, "coverage: got 'inside'"),
    (("hybrid",), {"feature_map": "relu"}, "feature_map: got 'relu'"),
    (("hybrid",), {"mix": "merge", "normalize": False}, "normalize: got False"),
    (("hybrid",), {"mix": "merge", "alpha": 1.0}, "alpha: got 1.0"),
    (("hybrid",), {"merge_bias": torch.rand(HQ)}, "merge_bias: got"),
    (("hybrid",), {"alpha": torch.rand(HK)}, "alpha: got"),
    (("hybrid",), {"mix": "merge", "merge_bias": torch.rand(B, T, HK)}, "merge_bias: got"),
    (("hybrid",), {"feature_scale": -1.0}, "feature_scale: got -1.0"),
]
CASES = [
    pytest.param(op, form, changes, message, id=f"{form}-{i}")
    for i, (ops, changes, message) in enumerate(BAD)
    for op in ops
    for form in FORMS[op]
]


@pytest.mark.parametrize("op, form, changes, message", CASES)
def test_bad_arguments(op, form, changes, message):
    with pytest.raises(ValueError) as error:
        getattr(lizard_ops, form)(**(tensors(op) | changes))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "form, changes, message",
    [
        ("chunk_gated_attn", {"chunk_size": 0}, "chunk_size"),
        ("chunk_gated_attn", {"impl": "fast"}, "impl: got 'fast'"),
        ("chunk_gated_attn", {"impl": "naive", "chunk_size": 4}, "chunk_size"),
        ("chunk_gated_attn", {"impl": "naive", "gate_form": "absorbed"}, "gate_form"),
        ("chunk_gated_attn", {"gate_form": "fused"}, "gate_form: got 'fused'"),
        ("chunk_gated_attn", {"gate_form": "absorbed", "g": None}, "gate_form"),
        ("chunk_gated_attn", {"gate_form": "absorbed", "g": -torch.rand(B, T, HK, K)}, "gate_form"),
        ("chunk_gated_attn", {"gate_form": "absorbed", "g": torch.full((B, T), -50.0)}, "gate_form"),
        ("chunk_hybrid_attn", {"gate_form": "absorbed", "feature_map": "softmax", "g": None}, "gate_form"),
        ("chunk_gated_attn", {"return_log_mass": 1}, "return_log_mass"),
        ("recurrent_gated_attn", {"return_log_mass": None}, "return_log_mass"),
        ("window_attn", {"return_lse": None}, "return_lse"),
        *(
            (form, {"output_final_state": 1}, "output_final_state: got 1")
            for op in EVERY
            for form in FORMS[op]
            if not form.startswith("naive")
        ),
        *(
            (form, {"impl": "fast"}, "impl: got 'fast'")
            for op in EVERY
            for form in FORMS[op]
            if not form.startswith("naive")
        ),
        ("chunk_hybrid_attn", {"impl": "naive", "gate_form": "absorbed"}, "gate_form"),
        ("recurrent_gated_attn", {"impl": "triton"}, "impl: got 'triton'"),
        ("recurrent_hybrid_attn", {"impl": "triton"}, "impl: got 'triton'"),
    ],
)
def test_bad_choices(form, changes, message):
    op = form.split("_")[-2]
    with pytest.raises(ValueError) as error:
        getattr(lizard_ops, form)(**(tensors(op) | changes))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("form", ["chunk_gated_attn", "window_attn", "chunk_hybrid_attn"])
def test_triton_is_not_replaced(form, monkeypatch):
    op = form.split("_")[-2]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl: got 'triton'"):
        getattr(lizard_ops, form)(**tensors(op), impl="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    double = {name: x.double() if torch.is_tensor(x) else x for name, x in tensors(op).items()}
    with pytest.raises(ValueError, match="float64"):
        getattr(lizard_ops, form)(**double, impl="triton")
    if op != "gated":
        with pytest.raises(ValueError, match="linear"):
            getattr(lizard_ops, form)(**tensors(op), impl="triton", sinks=torch.ones(2), sink_form="linear")


STEP = {"q": (1, HQ, K), "k": (1, HK, K), "v": (1, HK, V), "fq": (1, HQ, F), "fk": (1, HK, F), "g": (1, HK)}


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"q": torch.rand(B, T, HQ, K)}, "one token per row"),
        ({"padding_mask": torch.ones(B, 1, dtype=torch.bool)}, "one token per row"),
        ({"initial_state": None}, "without a carried state"),
        ({"sinks": torch.ones(2), "sink_form": "linear"}, "linear"),
        ({"merge_bias": torch.zeros(HQ, requires_grad=True)}, "gradients"),
        ({}, "TRITON_INTERPRET"),
    ],
)
def test_the_decode_kernel_is_not_replaced(changes, reason, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    options = {"window": 3, "mix": "merge", "coverage": "outside", "feature_map": "softmax"}
    state = lizard_ops.naive_hybrid_attn(**(tensors("hybrid") | options), output_final_state=True)[1]
    step = {name: -torch.rand(B, *shape) if name == "g" else torch.rand(B, *shape) for name, shape in STEP.items()}
    if "q" in changes:
        step = {name: x for name, x in tensors("hybrid").items() if name != "window"}
    with pytest.raises(ValueError, match=f"impl: got 'triton'.*{reason}"):
        lizard_ops.recurrent_hybrid_attn(
            **(step | options | {"initial_state": state} | {n: x for n, x in changes.items() if n != "q"}),
            impl="triton",
        )


def test_unknown_keywords_are_refused():
    with pytest.raises(TypeError):
        lizard_ops.chunk_gated_attn(**tensors("gated"), head_first=True)


def test_a_state_of_other_options_is_refused():
    x = tensors("gated")
    _, state = lizard_ops.chunk_gated_attn(**x, window_offset=2, output_final_state=True)
    for options in ({"window_offset": 3}, {"window_offset": 0}):
        with pytest.raises(ValueError, match="initial_state.ring"):
            lizard_ops.chunk_gated_attn(**x, **options, initial_state=state)
    with pytest.raises(ValueError, match="initial_state.ring_g"):
        lizard_ops.chunk_gated_attn(**(x | {"g": None}), window_offset=2, initial_state=state)


@pytest.mark.parametrize("op, form", [(op, form) for op in LINEAR for form in FORMS[op]])
def test_gates_of_padding_may_hold_anything(op, form):
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[:, 0] = False
    x = tensors(op)
    x["g"][:, 0] = torch.nan
    found = getattr(lizard_ops, form)(**x, padding_mask=mask)[0]
    rest = {name: t[:, 1:] if torch.is_tensor(t) else t for name, t in x.items()}
    wanted = getattr(lizard_ops, f"naive_{op}_attn")(**rest)[0]
    torch.testing.assert_close(found, torch.nn.functional.pad(wanted, (0, 0, 0, 0, 1, 0)))


def test_checked_mode_is_a_context():
    """It is what says whether values of another device are read, ends with its block and is this thread's alone."""
    from lizard_ops.common.checks import may_read

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")

    x, seen = torch.zeros(1).as_subclass(Elsewhere), []

    def look():
        seen.append(may_read(x))

    look()
    with checked():
        look()
        with checked(False):
            look()
        look()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    with pytest.raises(KeyError), checked():
        raise KeyError
    look()
    assert seen == [False, True, False, True, False, False]
    assert may_read(torch.zeros(1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_checked_mode_reads_gpu_values():
    x = {name: x.cuda() for name, x in tensors("gated").items()}
    x["g"] = -x["g"]
    lizard_ops.chunk_gated_attn(**x)
    with checked(), pytest.raises(ValueError, match="g: got"):
        lizard_ops.chunk_gated_attn(**x)
    one = {name: x.cuda() for name, x in ONE_ROW.items()}
    for ends in ([1, T], [0, 4, 2, T], [0, T - 1]):
        with checked(), pytest.raises(ValueError, match="cu_seqlens: got"):
            lizard_ops.chunk_gated_attn(**one, cu_seqlens=torch.tensor(ends, device="cuda"))


OUTSIDE, WIDE = {"coverage": "outside"}, {"fq": torch.rand(B, T, HQ, F + 1), "fk": torch.rand(B, T, HK, F + 1)}


@pytest.mark.parametrize(
    "op, before, after, field",
    [
        ("window", {"anchors": 3}, {}, "anchor_k: got shape"),
        ("window", {}, {"anchors": 3}, "anchor_k: got None"),
        ("window", {"anchors": 2}, {"anchors": 3}, "anchor_k: got shape"),
        ("window", {"window": 4}, {}, "ring_k: got shape"),
        ("hybrid", {"anchors": 3}, {}, "anchor_k: got shape"),
        ("hybrid", {}, {"anchors": 3}, "anchor_k: got None"),
        ("hybrid", {"feature_map": "softmax"}, {"feature_map": "identity"}, "s: got shape"),
        ("hybrid", {"feature_map": "identity"}, {"feature_map": "softmax"}, "s: got shape"),
        ("hybrid", {"feature_map": "softmax"}, {"feature_map": "exp"}, "log_scale: got None"),
        ("hybrid", {"feature_map": "exp"}, {"feature_map": "softmax"}, "log_scale: got shape"),
        ("hybrid", OUTSIDE, {}, "ring_fk: got shape"),
        ("hybrid", {}, OUTSIDE, "ring_fk: got None"),
        ("hybrid", OUTSIDE, OUTSIDE | {"g": None}, "ring_g: got shape"),
        ("hybrid", OUTSIDE | {"g": None}, OUTSIDE, "ring_g: got None"),
        ("hybrid", OUTSIDE, OUTSIDE | {"g": -torch.rand(B, T, 1)}, "ring_g: got shape"),
        ("hybrid", {}, {"g": -torch.rand(B, T, HQ)}, "s: got shape"),
        ("hybrid", WIDE, {}, "s: got shape"),
        ("gated", {"window_offset": 2}, {}, "ring_v: got shape"),
        ("gated", {}, {"window_offset": 2}, "ring_v: got None"),
    ],
)
def test_a_state_that_shows_other_options_is_refused(op, before, after, field):
    for form in FORMS[op]:
        function = getattr(lizard_ops, form)
        state = function(**(tensors(op) | before), output_final_state=True)[1]
        with pytest.raises(ValueError) as error:
            function(**(tensors(op) | after), initial_state=state)
        assert str(error.value).startswith(f"initial_state.{field}")


def test_a_state_of_another_op_and_a_position_below_zero_are_refused():
    states = {op: getattr(lizard_ops, FORMS[op][0])(**tensors(op), output_final_state=True)[1] for op in EVERY}
    for op in EVERY:
        for other in set(EVERY) - {op}:
            with pytest.raises(ValueError, match="initial_state."):
                getattr(lizard_ops, FORMS[op][0])(**tensors(op), initial_state=states[other])
        with pytest.raises(ValueError, match="initial_state.position: got -1"):
            getattr(lizard_ops, FORMS[op][0])(
                **tensors(op), initial_state=states[op]._replace(position=states[op].position * 0 - 1)
            )


@pytest.mark.parametrize(
    "op, changes, message",
    [
        ("gated", {"g": -torch.rand(HK)}, "g: got shape"),  # g_gamma
        ("gated", {"g": -torch.rand(B, T, HK).half()}, "g: got shape"),
        ("gated", {"g": torch.full((B, T, HK), 1e-8)}, "g: got 9.9"),
        ("gated", {"initial_state": torch.zeros(B, HK, K, V)}, "initial_state: got 'Tensor'"),
        ("gated", {"initial_state": STATE._replace(s=torch.zeros(B, HK, K, V)), "normalize": False}, "initial_state.z"),
        ("gated", {"v": torch.rand(B, T, HK, V).bfloat16()}, "v: got shape"),
        ("window", {"window": None}, "window: got None"),
    ],
)
def test_calls_of_flash_linear_attention_are_refused(op, changes, message):
    """docs/ops.md: what its functions take and ours do not."""
    for form in FORMS[op]:
        with pytest.raises(ValueError) as error:
            getattr(lizard_ops, form)(**(tensors(op) | changes))
        assert str(error.value).startswith(message)
    with pytest.raises(TypeError):
        lizard_ops.chunk_gated_attn(**(tensors("gated") | {"gk": None}))
