"""Gate and merge bias from a layer's input: the function that layers call."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.autocast import without_autocast
from lizard_ops.common.direct import PLAIN, Looking, is_in_mode, who_looks
from lizard_ops.common.dispatch import choose_impl
from lizard_ops.common.kinds import Kinds
from lizard_ops.gate.formula import gate_and_bias_formula

_accepted = Kinds()

FEW = 128  # tokens for which a program for each number reads no more than products of matrices do


def gate_and_bias(
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    bias_weight: Tensor,
    bias: Tensor | None,
    *,
    temperature: float = 1.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The log-decays of a layer's linear branch and the bias of its merge, both of the layer's input::

        g[b, t, h] = log sigmoid(sum_d x[b, t, d] gate_weight[h, d] + gate_bias[h]) / temperature
        m[b, t, h] = sum_d x[b, t, d] bias_weight[h, d] + bias[h]

    Args:
        x: [B, T, D], any floating dtype.
        gate_weight, gate_bias: [G, D] and [G], float32, or float64 like all weights.
        bias_weight, bias: [H, D] and [H]; bias None is 0.
        temperature: a positive finite number.
        impl: "auto" (Triton for at most 128 tokens on a GPU, as in decoding, unless a tensor is float64, a gradient is
            recorded or torch.compile traces; elsewhere products of matrices, of bfloat16 x on a GPU with the weights
            as sums of three bfloat16 parts, which have float32's digits), "triton", "torch" or "naive" (which is
            "torch").

    Products and sums are those of float32 (float64 for float64 tensors), under autocast too.

    Returns:
        (g [B, T, G], m [B, T, H]), float32 or float64. Triton sums in another order than PyTorch.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, or an impl that cannot do what is asked.

    Source: the gate of Gated Linear Attention per head (arXiv 2312.06635); the merge bias is this library's.
    """
    given = (x, gate_weight, gate_bias, bias_weight, bias)
    _accepted.check(given, (temperature,), lambda: check_gate_and_bias(*given, temperature))
    double = x.dtype == torch.float64 or gate_weight.dtype == torch.float64
    looking = who_looks(*(given[:4] if bias is None else given))
    recorded = looking is Looking.AUTOGRAD
    if looking is Looking.MORE:
        recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    many = impl == "auto" and (torch.compiler.is_compiling() or x.shape[0] * x.shape[1] > FEW)
    beyond = "float64 tensors" if double else "gradients" if recorded else None
    if not many and choose_impl(impl, x, beyond) == "triton":
        from lizard_ops.gate.triton_op import gate_and_bias_triton

        return gate_and_bias_triton(*given, float(temperature))
    with without_autocast(x):
        if impl == "auto" and x.dtype == torch.bfloat16 and not double and takes_parts(given, recorded, looking):
            from lizard_ops.gate.parts import gate_and_bias_in_parts

            return gate_and_bias_in_parts(*given, temperature, looking is Looking.NOBODY)
        return gate_and_bias_formula(x if double else x.float(), *given[1:], temperature)


def takes_parts(given: tuple[Tensor | None, ...], recorded: bool, looking: Looking) -> bool:
    """Whether these are plain tensors on a GPU, no gradient of which is recorded where somebody looks at operators, and
    that no tracer or transform has. looking: who does."""
    if looking is Looking.MORE:
        plain = all(t is None or type(t) in PLAIN for t in given)
        if not plain or recorded or not is_in_mode():
            return False
    return choose_impl("auto", given[0], None) == "triton"  # type: ignore[arg-type]


def check_gate_and_bias(
    x: Tensor, gate_weight: Tensor, gate_bias: Tensor, bias_weight: Tensor, bias: Tensor | None, temperature: float
) -> None:
    """Raises as ``gate_and_bias``."""
    fits = isinstance(x, Tensor) and x.ndim == 3 and x.dtype in checks.FLOATS and x.shape[2] > 0
    checks.want(fits, "x", x, "a floating tensor [B, T, D], D >= 1")
    double = x.dtype == torch.float64 or getattr(gate_weight, "dtype", None) == torch.float64
    kind = (torch.float64,) if double else (torch.float32,)
    for name, weight in (("gate_weight", gate_weight), ("bias_weight", bias_weight)):
        rows = weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 2 else 1
        checks.check_tensor(name, weight, (rows, x.shape[2]), x, kind)
    checks.check_tensor("gate_bias", gate_bias, gate_weight.shape[:1], x, kind)
    if bias is not None:
        checks.check_tensor("bias", bias, bias_weight.shape[:1], x, kind)
    real = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    checks.want(real and 0 < temperature < math.inf, "temperature", temperature, "a positive finite number")
