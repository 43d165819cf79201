"""The projection as torch.library sees it, and the gradient that takes in x's other one."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from lizard_ops.common.direct import direct, is_watched, nobody_looks, recorded
from lizard_ops.common.dispatch import on_device
from lizard_ops.common.flat import differentiable_once
from lizard_ops.common.sizes import cdiv, power_of_2
from lizard_ops.feature_projection.triton.kernels import (
    both_gradients_kernel,
    gradients_of_both_kernel,
    input_gradient_kernel,
    project_both_kernel,
    project_kernel,
    weight_gradient_kernel,
)
from lizard_ops.tiles.launch import Launch
from lizard_ops.tiles.launcher import launch_kernel
from lizard_ops.tiles.plans import Arguments, Plan, launch_planned
from lizard_ops.tuning import tunable

TOKENS = 64  # rows of a tile
STEPS = 16  # tiles that one program takes with the same matrix
SPLITS = 32  # programs that share the tokens of a weight gradient


@tunable("project")
def config_for(kernel: str, x: Tensor, weight: Tensor) -> Launch:
    """Launch configuration of a kernel, "output", "input", "weight" or "both" (gradients)."""
    columns = blocks(*weight.shape[1:])
    one = columns["F"] <= columns["BF"]  # else the matrix is read anew a tile, and every stage holds all of it
    stages = {"output": 3, "input": 3 if one else 1}.get(kernel, 2)
    return Launch(columns["BN"], columns["BF"], 4, stages)


@functools.cache
def blocks(dim: int, features: int) -> dict[str, Any]:
    """Tile shapes for a weight [M, dim, features]: the whole head dim, and as many features as registers hold."""
    wide = max(16, power_of_2(dim))
    columns = max(16, min(power_of_2(features), 64 if wide > 128 else 128))
    return {"D": dim, "BD": wide, "F": features, "BF": columns, "BN": TOKENS}


def precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def rows(x: Tensor) -> Tensor:
    """x with a unit last stride."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def tiles_each(tokens: int) -> int:
    """Tiles that one program takes: not fifteen empty ones in a decode step."""
    return STEPS if tokens > TOKENS else 1


@functools.lru_cache(maxsize=1024)
def shares(tokens: int) -> tuple[int, int]:
    """(programs that share the tokens of a weight gradient, tiles that each takes)."""
    splits = max(1, min(SPLITS, cdiv(tokens, TOKENS)))
    return splits, cdiv(tokens, TOKENS * splits)


@torch.library.custom_op("lizard_ops::project_heads", mutates_args=())
def project(x: Tensor, weight: Tensor) -> Tensor:
    """y [B, T, H, F] = x [B, T, H, D] times weight [M, D, F]."""
    x, weight = rows(x), weight.contiguous()
    batch, length, heads = x.shape[:3]
    y = x.new_empty(batch, length, heads, weight.shape[2])
    tokens, tile = batch * length, blocks(*weight.shape[1:])
    each = tiles_each(tokens)
    if tokens:
        count = cdiv(tokens, TOKENS * each) * heads * cdiv(tile["F"], tile["BF"])
        with on_device(x, dim=weight.shape[1], features=weight.shape[2]):
            c = config_for("output", x, weight)
            launch_kernel(
                project_kernel, count,
                x, weight, y, tokens, length, *x.stride()[:3], H=heads, M=weight.shape[0], STEPS=each,
                PRECISION=precision(x), **tile, num_stages=c.stages, **c.launch,
            )  # fmt: skip
    return y


@project.register_fake
def _(x, weight):
    return x.new_empty(*x.shape[:3], weight.shape[2])


@torch.library.custom_op("lizard_ops::project_heads_backward", mutates_args=())
def project_backward(
    x: Tensor, weight: Tensor, dy: Tensor, d_x: Tensor | None, of_x: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dweight), empty where not asked for. d_x [B, T, H, D]: a gradient of x to add."""
    dx = x.new_empty(x.shape if of_x else (0,))
    return dx, gradients(x, weight, dy, None if d_x is None else rows(d_x), dx if of_x else None, of_weight)


@project_backward.register_fake
def _(x, weight, dy, d_x, of_x, of_weight):
    return x.new_empty(x.shape if of_x else (0,)), weight.new_empty(weight.shape if of_weight else (0,))


@torch.library.custom_op("lizard_ops::project_heads_backward_into", mutates_args=("d_x",))
def project_backward_into(x: Tensor, weight: Tensor, dy: Tensor, d_x: Tensor, of_weight: bool) -> Tensor:
    """dweight, empty if not asked for; dy weight^T is added to d_x [B, T, H, D], contiguous, where it lies."""
    return gradients(x, weight, dy, d_x, d_x, of_weight)


@project_backward_into.register_fake
def _(x, weight, dy, d_x, of_weight):
    return weight.new_empty(weight.shape if of_weight else (0,))


def gradients(
    x: Tensor, weight: Tensor, dy: Tensor, d_x: Tensor | None, dx: Tensor | None, of_weight: bool,
    plan: Plan | None = None, name: str = "",
) -> Tensor:  # fmt: skip
    """dweight; fills dx, contiguous, if it is there. It may be d_x: a tile is read before it is written. plan: of a
    known kind of call, in which the launches have this name."""
    x, dy, weight = rows(x), rows(dy), weight.contiguous()
    batch, length, heads = x.shape[:3]
    maps, tokens, tile = weight.shape[0], batch * length, blocks(*weight.shape[1:])
    if not of_weight:
        d_weight = weight.new_empty(0)
    elif not tokens:
        d_weight = weight.new_zeros(weight.shape)
    splits, steps = shares(tokens)
    of_x = dx is not None
    together = of_x and of_weight and x.dtype != torch.float32 and tile["F"] <= tile["BF"] and tile["BD"] <= 128
    parts = weight.new_empty(splits, heads, *weight.shape[1:]) if of_weight and tokens else None

    def arguments(kind: str) -> Arguments:
        c, each, unit = config_for(kind, x, weight), tiles_each(tokens), math.gcd(8, *dy.stride()[:3])
        of_dy, of_sum = [step // unit for step in dy.stride()[:3]], (0, 0, 0) if d_x is None else d_x.stride()[:3]
        common = {"H": heads, "M": maps, "YU": unit, "PRECISION": precision(x)} | tile | c.launch
        if kind == "both":
            args = (x, dy, weight, d_x, dx, parts, tokens, length, *x.stride()[:3], *of_dy, *of_sum, steps)
            return splits * heads, args, common | {"STAGES": c.stages}
        if kind == "input":
            args = (dy, weight, d_x, dx, tokens, length, *of_dy, *of_sum)
            return cdiv(tokens, TOKENS * each) * heads, args, common | {"STEPS": each, "num_stages": c.stages}
        args = (x, dy, parts, tokens, length, *x.stride()[:3], *of_dy, steps)
        return splits * heads * cdiv(tile["F"], tile["BF"]), args, common | {"STAGES": c.stages}

    with on_device(x, dim=weight.shape[1], features=weight.shape[2]):
        if together and tokens:
            tensors = (x, dy, weight, d_x, dx, parts)
            launch_planned(plan, f"both {name}", both_gradients_kernel, tensors, lambda: arguments("both"))
        elif tokens and of_x:
            tensors = (dy, weight, d_x, dx)
            launch_planned(plan, f"input {name}", input_gradient_kernel, tensors, lambda: arguments("input"))
        if parts is not None:
            if not together:
                tensors = (x, dy, parts)
                launch_planned(plan, f"weight {name}", weight_gradient_kernel, tensors, lambda: arguments("weight"))
            d_weight = sum_of_parts(parts, maps)
    return d_weight


def sum_of_parts(parts: Tensor, maps: int) -> Tensor:
    """[M, D, F] of parts [splits, H, D, F], over splits and the heads of each map."""
    splits, heads, *rest = parts.shape
    return parts.view(splits, maps, heads // maps, *rest).sum((0, 2))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    needed = ctx.needs_input_grad
    dx, d_weight = project_backward(x, weight, dy, None, *needed)
    return dx if needed[0] else None, d_weight if needed[1] else None


project.register_autograd(_backward, setup_context=_setup_context)
differentiable_once(project_backward, "project_heads")


def both_gradients(
    x: Tensor, weight: Tensor, d_x: Tensor | None, dy: Tensor | None, of_x: bool, of_weight: bool, reuse_gradient: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Those of x and weight from what comes back for x itself and for y."""
    if dy is None:
        return d_x, None
    reuse = reuse_gradient and not torch.is_grad_enabled()  # a gradient that is differentiated must stay
    if reuse and of_x and d_x is not None and d_x.is_contiguous() and d_x.dtype == x.dtype:
        dx, d_weight = d_x, project_backward_into(x, weight, dy, d_x, of_weight)
    else:
        backward = direct(project_backward, x, weight, dy, d_x)
        dx, d_weight = backward(x, weight, dy, d_x, of_x, of_weight)
    return dx if of_x else None, d_weight if of_weight else None


class _ProjectBoth(torch.autograd.Function):
    """(x, y), so that both gradients of x meet in one kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, reuse_gradient: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        ctx.reuse_gradient = reuse_gradient
        return x.view_as(x), direct(project, x, weight)(x, weight)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        return *both_gradients(*ctx.saved_tensors, d_x, dy, *ctx.needs_input_grad[:2], ctx.reuse_gradient), None


def launch_both(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, plan: Plan | None = None
) -> tuple[Tensor, Tensor]:
    """``project`` of queries [B, T, Hq, D] and keys [B, T, H, D], T and B > 0, of one dtype, at once. plan: of a known
    kind of call."""
    q, k, weight_q, weight_k = rows(q), rows(k), weight_q.contiguous(), weight_k.contiguous()
    dim, features = weight_q.shape[1:]
    y_q, y_k = q.new_empty(*q.shape[:3], features), k.new_empty(*k.shape[:3], features)
    tensors = (q, k, weight_q, weight_k, y_q, y_k)

    def arguments() -> Arguments:
        (batch, length, heads), key_heads = q.shape[:3], k.shape[2]
        tokens, tile = batch * length, blocks(dim, features)
        each = tiles_each(tokens)
        of_head = cdiv(tokens, TOKENS * each) * cdiv(tile["F"], tile["BF"])
        c = config_for("output", q, weight_q)
        args = (*tensors, tokens, length, *q.stride()[:3], *k.stride()[:3])
        named = {
            "HQ": heads, "MQ": weight_q.shape[0], "HK": key_heads, "MK": weight_k.shape[0], "first": of_head * heads,
            "STEPS": each, "PRECISION": precision(q), "num_stages": c.stages,
        }  # fmt: skip
        return of_head * (heads + key_heads), args, named | tile | c.launch

    with on_device(q, dim=dim, features=features):
        launch_planned(plan, "projected", project_both_kernel, tensors, arguments)
    return y_q, y_k


def gradients_of_both(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, dy_q: Tensor, dy_k: Tensor, dq: Tensor, dk: Tensor,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``gradients`` of queries and of keys, those of both weights; what comes to q and k is added to dq and dk,
    contiguous. In one launch where half-precision tiles hold a row of both. plan: of a known kind of call."""
    batch, length, heads, dim = q.shape
    tokens, tile, key_heads = batch * length, blocks(*weight_q.shape[1:]), k.shape[2]
    units = [math.gcd(8, *dy.stride()[:3]) for dy in (dy_q, dy_k)]
    one = weight_q.shape[1:] == weight_k.shape[1:] and q.dtype == k.dtype != torch.float32 and units[0] == units[1]
    if not one or not tokens or tile["F"] > tile["BF"] or tile["BD"] > 128:
        of_queries = gradients(q, weight_q, dy_q, dq, dq, True, plan, "queries")
        return of_queries, gradients(k, weight_k, dy_k, dk, dk, True, plan, "keys")
    q, k, dy_q, dy_k = rows(q), rows(k), rows(dy_q), rows(dy_k)
    weight_q, weight_k = weight_q.contiguous(), weight_k.contiguous()
    splits, steps = shares(tokens)
    parts = [weight_q.new_empty(splits, n, *weight_q.shape[1:]) for n in (heads, key_heads)]
    tensors = (q, dy_q, weight_q, dq, parts[0], k, dy_k, weight_k, dk, parts[1])

    def arguments() -> Arguments:
        c = config_for("both", q, weight_q)
        strides = [
            step for x, dy, dx in ((q, dy_q, dq), (k, dy_k, dk))
            for step in (*x.stride()[:3], *(s // units[0] for s in dy.stride()[:3]), *dx.stride()[:3])
        ]  # fmt: skip
        named = {
            "HQ": heads, "MQ": weight_q.shape[0], "HK": key_heads, "MK": weight_k.shape[0], "first": splits * heads,
            "YU": units[0], "PRECISION": precision(q), "STAGES": c.stages,
        }  # fmt: skip
        args = (*tensors, tokens, length, *strides, steps)
        return splits * (heads + key_heads), args, named | tile | c.launch

    with on_device(q, dim=dim, features=tile["F"]):
        launch_planned(plan, "both", gradients_of_both_kernel, tensors, arguments)
    return sum_of_parts(parts[0], len(weight_q)), sum_of_parts(parts[1], len(weight_k))


class _ProjectTwo(torch.autograd.Function):
    """``_ProjectBoth`` of queries and of keys, in one node and one launch forward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weight_q, weight_k, ctx.reuse_gradient = rest
        ctx.save_for_backward(q, k, weight_q, weight_k)
        ctx.set_materialize_grads(False)
        return q.view_as(q), k.view_as(k), *launch_both(q, k, weight_q, weight_k)

    @staticmethod
    def backward(ctx: Any, d_q: Tensor | None, d_k: Tensor | None, *dy: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, weight_q, weight_k = ctx.saved_tensors
        of_q, of_k, of_weight_q, of_weight_k, _ = ctx.needs_input_grad
        dq, d_weight_q = both_gradients(q, weight_q, d_q, dy[0], of_q, of_weight_q, ctx.reuse_gradient)
        dk, d_weight_k = both_gradients(k, weight_k, d_k, dy[1], of_k, of_weight_k, ctx.reuse_gradient)
        return dq, dk, d_weight_q, d_weight_k, None


record_two = recorded(_ProjectTwo)


def project_both_triton(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, reuse_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, fq, fk); one after the other for those who look at operators, and where one launch cannot do both."""
    one = q.dtype == k.dtype and weight_q.shape[1:] == weight_k.shape[1:] and q.numel() and k.numel()
    if is_watched() or not one:
        q, fq = project_heads_triton(q, weight_q, reuse_gradient)
        k, fk = project_heads_triton(k, weight_k, reuse_gradient)
        return q, k, fq, fk
    if nobody_looks(q, k, weight_q, weight_k):
        return q, k, *launch_both(q, k, weight_q, weight_k)
    return record_two(q, k, weight_q, weight_k, reuse_gradient)


def project_heads_triton(x: Tensor, weight: Tensor, reuse_gradient: bool) -> tuple[Tensor, Tensor]:
    """(x, y). While torch.compile traces, the sum of x's gradients is left to the compiler."""
    if torch.compiler.is_compiling():
        return x, project(x, weight)
    if nobody_looks(x, weight):
        return x, direct(project)(x, weight)
    return _ProjectBoth.apply(x, weight, reuse_gradient)
