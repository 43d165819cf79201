"""The counts of the rooflines against arithmetic that is written out and counted, and against a real state."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lizard_ops
from benchmarks.gpu import roofline
from benchmarks.gpu.roofline import Layer, total

SMALL = Layer(N=8, H=4, K=2, D=6, P=3, W=5, A=2, E=3, C=8)


def one_chunk(at):
    """A chunk inside a long text, for each head: what a layer multiplies there."""
    chunk, seen, group = at.C, at.W + at.A + at.E, at.H // at.K

    def drawn(*shape):
        return torch.randn(*shape, requires_grad=True)

    x = {name: drawn(heads, chunk, at.D) for name, heads in (("q", at.H), ("k", at.K))}
    maps = {name: drawn(heads, at.D, at.P) for name, heads in (("q", at.H), ("k", at.K))}
    v, states = drawn(at.K, chunk, at.D), drawn(at.K, 2 * at.P, at.D)
    exact_k, exact_v = drawn(at.K, chunk, seen, at.D), drawn(at.K, chunk, seen, at.D)
    phi = {n: [torch.cat([y, -y], 1) for y in (x[n][h] @ maps[n][h] for h in range(len(x[n])))] for n in ("q", "k")}
    sums = [phi["k"][h].T @ v[h] for h in range(at.K)]  # goes into the next chunk
    outputs = []
    for head in range(at.H):
        key = head // group
        outputs.append(phi["q"][head] @ states[key])
        for row in range(chunk):
            inside = phi["q"][head][row : row + 1] @ phi["k"][key][: row + 1].T
            near = x["q"][head][row : row + 1] @ exact_k[key, row].T
            outputs += [inside @ v[key][: row + 1], near @ exact_v[key, row]]
    return sum((y * y).sum() for y in (*outputs, *sums))


def test_operations_are_those_of_the_arithmetic_written_out():
    with FlopCounterMode(display=False) as forward:
        loss = one_chunk(SMALL)
    assert total(roofline.forward_operations(SMALL)) == forward.get_total_flops()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    gradients = [t for t in roofline.backward_operations(SMALL) if t.what.startswith("gradients")]
    assert total(gradients) == backward.get_total_flops()


def test_what_a_backward_computes_again_is_part_of_a_forward():
    forward = {t.formula: t.value for t in roofline.forward_operations(SMALL)}
    again = [t for t in roofline.backward_operations(SMALL) if t.what.startswith("again")]
    assert len(again) == 3 and all(forward[t.formula] == t.value for t in again)


@pytest.mark.parametrize("kept", [0, 3])
def test_bytes_of_a_step_are_those_of_its_state(kept):
    at, half = Layer(N=3, H=4, K=2, D=16, P=8, W=8, A=2, E=kept), torch.bfloat16
    draw = torch.Generator().manual_seed(0)
    x = {
        name: torch.randn(at.N, 1, heads, size, generator=draw).to(half)
        for name, heads, size in (("q", 4, 16), ("k", 2, 16), ("v", 2, 16), ("fq", 4, 8), ("fk", 2, 8))
    }
    x["g"] = -torch.rand(at.N, 1, at.K)
    options = {"kept_keys": kept, "scores": torch.rand(at.N, 1, at.K)} if kept else {}
    o, state = lizard_ops.recurrent_hybrid_attn(
        **x, window=at.W, anchors=at.A, mix="merge", coverage="outside", feature_map="softmax",
        merge_bias=torch.zeros(at.N, 1, at.H), output_final_state=True, **options,
    )  # fmt: skip
    size = {name: t.nbytes for name, t in state._asdict().items() if t is not None}
    found = {t.what: t.value for t in roofline.decode_bytes(at)}
    assert found["sums, read and written"] == 2 * (size["s"] + size["z"])
    assert found["keys and values of the window"] == size["ring_k"] + size["ring_v"]
    assert found["its gates"] == size["ring_g"]
    assert found["anchors"] == size["anchor_k"] + size["anchor_v"]
    slot = size["ring_k"] + size["ring_v"] + 2 * size["ring_fk"] + size["ring_g"]
    assert found["its slot of the new token: key, value, features twice, gate"] == slot // at.W
    token = o.nbytes + sum(x[name].nbytes for name in ("q", "k", "v", "fq", "fk"))
    assert found["the token: q, o, k, v, pre-activations"] == token
    held = size["kept_scores"] + size["kept_positions"] + 2 * size["kept_g"] if kept else 0
    assert found["their scores and positions, their gates read and written"] == held
    assert found["kept keys and values"] == (size["kept_k"] + size["kept_v"] if kept else 0)
    place = sum(size[f"kept_{name}"] for name in ("k", "v", "scores", "positions")) + 2 * size["kept_fk"] if kept else 0
    assert found["the place that changes hands"] == place // max(kept, 1)


def test_the_floor_is_the_slower_of_both():
    speeds = {"operations_s": 1e12, "bytes_s": 1e9}
    bound = roofline.row("decode", Layer(N=1), 10.0, speeds)
    assert bound["floor_ms"] == bound["copy_ms"] == pytest.approx(1e3 * bound["bytes"] / 1e9)
    assert bound["share"] == pytest.approx(bound["floor_ms"] / 10)
    bound = roofline.row("forward", Layer(), 1.0, speeds | {"bytes_s": 1e15})
    assert bound["floor_ms"] == bound["product_ms"] == pytest.approx(bound["operations"] / 1e9)


def test_the_table_has_a_line_for_each_row():
    results = roofline.counts()
    lines = roofline.table(results).splitlines()
    assert len(lines) == 2 + len(results["rows"]) == 12
    assert lines[2].startswith("| forward | 1") and lines[3].startswith("| forward, 256 kept |")
