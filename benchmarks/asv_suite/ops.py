"""Time, peak memory, error and growth with T of every op, on the implementation that this device gets by default."""

from __future__ import annotations

import torch
from asv_suite.common import ANCHORS, WINDOW, Inputs, make_inputs
from asv_suite.memory import peak_bytes

import lizard_ops

LENGTHS = [512, 2048]
HYBRID = dict(anchors=ANCHORS, mix="merge", coverage="outside", feature_map="softmax")


def gated(x: Inputs, op=lizard_ops.chunk_gated_attn):
    return op(x.phi_q, x.phi_k, x.v, x.g)[0]


def window(x: Inputs, op=lizard_ops.window_attn):
    return op(x.q, x.k, x.v, WINDOW, anchors=ANCHORS)[0]


def hybrid(x: Inputs, op=lizard_ops.chunk_hybrid_attn):
    return op(x.q, x.k, x.v, x.fq, x.fk, x.g, WINDOW, **HYBRID)[0]


OPS = {"gated": gated, "window": window, "hybrid": hybrid}
NAIVE = {
    "gated": lizard_ops.naive_gated_attn,
    "window": lizard_ops.naive_window_attn,
    "hybrid": lizard_ops.naive_hybrid_attn,
}


def forward_backward(name: str, x: Inputs) -> None:
    OPS[name](x).sum().backward()
    for tensor in x.tensors():
        tensor.grad = None


class Forward:
    params = [list(OPS), LENGTHS]
    param_names = ["op", "length"]

    def setup(self, name, length):
        self.inputs = make_inputs(length)

    def time_forward(self, name, length):
        with torch.no_grad():
            OPS[name](self.inputs)


class ForwardBackward:
    params = [list(OPS), LENGTHS]
    param_names = ["op", "length"]

    def setup(self, name, length):
        self.inputs = make_inputs(length, requires_grad=True)

    def time_forward_backward(self, name, length):
        forward_backward(name, self.inputs)

    def track_peak_memory(self, name, length):
        return peak_bytes(lambda: forward_backward(name, self.inputs))

    track_peak_memory.unit = "bytes"


class Growth:
    """Time at twice the length over time at the length: 2 is linear, 4 is quadratic."""

    params = [list(OPS)]
    param_names = ["op"]

    def setup(self, name):
        self.short, self.long = make_inputs(2048), make_inputs(4096)

    def track_growth(self, name):
        from timeit import repeat

        with torch.no_grad():
            short, long = (min(repeat(lambda x=x: OPS[name](x), number=1, repeat=5)) for x in (self.short, self.long))
        return long / short

    track_growth.unit = "ratio"


class Error:
    """Largest error against the float64 reference over the naive op's in the same dtype: the promise is at most 2."""

    params = [list(OPS), ["float32", "bfloat16"]]
    param_names = ["op", "dtype"]

    def track_error_over_naive(self, name, dtype):
        rounded = make_inputs(257, getattr(torch, dtype))
        reference = OPS[name](Inputs(*(x.double() for x in rounded.tensors())), NAIVE[name])
        fast, naive = OPS[name](rounded).double(), OPS[name](rounded, NAIVE[name]).double()
        return ((fast - reference).abs().max() / (naive - reference).abs().max()).item()

    track_error_over_naive.unit = "ratio"


class Decode:
    """One token through the recurrent hybrid step: the time must not depend on how long the text was."""

    def setup(self):
        x = make_inputs(512)
        *_, self.state = lizard_ops.chunk_hybrid_attn(
            x.q, x.k, x.v, x.fq, x.fk, x.g, WINDOW, output_final_state=True, **HYBRID
        )
        one = make_inputs(1)
        self.step = (one.q, one.k, one.v, one.fq, one.fk, one.g)

    def time_step(self):
        with torch.no_grad():
            lizard_ops.recurrent_hybrid_attn(
                *self.step, WINDOW, initial_state=self.state, output_final_state=True, **HYBRID
            )
