"""What each of four processes does in ``test_context_ranks.py``: its part of a case, and what one process gives."""

from __future__ import annotations

import dataclasses
import datetime
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist
from op_cases import cases
from op_checks import one_of
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lizard_ops import AttentionState, chunk_gated_attn, chunk_hybrid_attn, window_attn

RANKS = 4
OPS = {"gated": chunk_gated_attn, "window": window_attn, "hybrid": chunk_hybrid_attn}
CASES: dict[str, Callable] = {}
LENGTH = 46
LIZARD = {
    "T": LENGTH, "B": 2, "mix": "merge", "coverage": "outside", "feature_map": "softmax", "gate": "key",
    "weight": "head", "decay": 0.02,
}  # fmt: skip


def case_of_ranks(run: Callable) -> Callable:
    CASES[run.__name__] = run
    return run


@dataclasses.dataclass
class Rank:
    """One of the processes: ``mesh`` [2, 2] of which each row is a group of its own, ``all`` of the four."""

    at: int
    mesh: DeviceMesh
    all: DeviceMesh


def attend(case, at, **more):
    """(o, state) of the op on the positions ``at`` of a case."""
    part = case.part(slice(None), at)
    options = case.options | case.weights | more
    size = [options.pop("window")] if "window" in options else []
    names = {"gated": ("q", "k", "v", "g"), "window": ("q", "k", "v"), "hybrid": ("q", "k", "v", "fq", "fk", "g")}
    given = [part.tokens[name] for name in names[case.op]]
    by_token = {name: x for name, x in part.tokens.items() if name not in names[case.op]}
    return OPS[case.op](*given, *size, **by_token, **options)


def compared(case, group, ends, tolerance=1e-9, mask=None):
    """Outputs, the last rank's state and all gradients of parts between ``ends`` over a group, against the whole."""
    ranks = group.get_group() if isinstance(group, DeviceMesh) else group
    here = slice(ends[ranks.rank()], ends[ranks.rank() + 1])
    leaves = {name: x.clone().requires_grad_() for name, x in case.leaves().items() if name != "scores"}
    given = case.map(lambda name, x: leaves.get(name, x), weights=True)
    padded = {} if mask is None else {"padding_mask": mask}
    whole, state = attend(given, slice(None), output_final_state=True, **padded)
    cotangent = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(whole)
    wanted = torch.autograd.grad(whole, list(leaves.values()), cotangent, allow_unused=True)
    padded = {} if mask is None else {"padding_mask": mask[:, here]}
    o, last = attend(given, here, output_final_state=True, context_group=group, **padded)
    check("o", o, whole[:, here], tolerance)
    if ranks.rank() == ranks.size() - 1:
        for name, x in scaled(state).items():
            check(name, scaled(last)[name], x, tolerance)
    found = torch.autograd.grad(o, list(leaves.values()), cotangent[:, here], allow_unused=True)
    for name, mine, all_of_it in zip(leaves, found, wanted, strict=True):
        if all_of_it is None:
            continue
        if name in case.tokens:
            check(f"d {name}", mine[:, here], all_of_it[:, here], tolerance)
            assert not mine[:, : here.start].any() and not mine[:, here.stop :].any(), name
        else:
            dist.all_reduce(mine, group=ranks)
            check(f"d {name}", mine, all_of_it, tolerance)


def scaled(state: AttentionState) -> dict[str, torch.Tensor]:
    """The fields of a state, its sums times the exponential of their log scale."""
    fields = {name: x for name, x in state._asdict().items() if x is not None}
    log_scale = fields.pop("log_scale", None)
    for name in ("s", "z") if log_scale is not None else ():
        fields[name] = fields[name] * log_scale.exp().view(*log_scale.shape, *[1] * (fields[name].ndim - 2))
    return fields


def check(name, found, wanted, tolerance):
    if not wanted.is_floating_point():
        assert torch.equal(found, wanted), name
        return
    finite = wanted.isfinite()
    assert torch.equal(found.isfinite(), finite), name
    found, wanted = (torch.where(finite, x, 0).double() for x in (found, wanted))
    error = (found - wanted).abs().max().item() if wanted.numel() else 0.0
    assert error <= tolerance * max(1.0, wanted.abs().max().item() if wanted.numel() else 0.0), (name, error)


EVEN = [0, 12, 24, 36, LENGTH]
UNEVEN = [0, 1, 20, 23, LENGTH]


@case_of_ranks
def four_ranks_are_one(rank):
    compared(one_of(cases("hybrid", **LIZARD)), rank.all, EVEN)


@case_of_ranks
def two_ranks_of_a_mesh_of_four_are_one(rank):
    """Each pair has a text of its own: the other pair's are not among its messages."""
    seed = 3 + rank.at // 2
    compared(one_of(cases("hybrid", **LIZARD, seed=seed)), rank.mesh["context"], [0, 20, LENGTH])


@case_of_ranks
def a_window_wider_than_a_part(rank):
    compared(one_of(cases("hybrid", **LIZARD, window=9, anchors=3)), rank.all.get_group(), UNEVEN)


@case_of_ranks
def the_other_ops(rank):
    compared(one_of(cases("window", T=LENGTH)), rank.all, UNEVEN)
    compared(one_of(cases("gated", T=LENGTH, gate="channel", offset=5)), rank.all, UNEVEN)
    compared(one_of(cases("gated", T=LENGTH, gate="query", normalize=False)), rank.all, EVEN)


@case_of_ranks
def exponential_features(rank):
    for gate in ("query", "channel", None):
        compared(one_of(cases("hybrid", **LIZARD | {"feature_map": "exp", "gate": gate})), rank.all, EVEN)


@case_of_ranks
def kept_keys(rank):
    for coverage, places in (("outside", 7), ("left", 3), ("outside", [5, 0]), ("all", 4)):
        case = one_of(cases("hybrid", **LIZARD | {"coverage": coverage}, Hk=2, window=4))
        scores = torch.randn(case.tokens["k"].shape[:3], generator=torch.Generator().manual_seed(5)).round(decimals=1)
        case.tokens["scores"] = scores
        case.options |= {"kept_keys": places, "score_delay": 2}
        compared(case, rank.all, UNEVEN)


@case_of_ranks
def padding_of_a_batch(rank):
    mask = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(2)) > 0.3
    mask[0, :22] = False
    compared(one_of(cases("hybrid", **LIZARD)), rank.all, EVEN, mask=mask)


@case_of_ranks
def lower_precision(rank):
    """Messages hold several dtypes; gradients travel as float32."""
    case = one_of(cases("hybrid", **LIZARD))
    compared(case.cast(torch.float32), rank.all, EVEN, tolerance=2e-5)
    compared(case.cast(torch.bfloat16), rank.all, EVEN, tolerance=3e-2)


@case_of_ranks
def without_gradients(rank):
    case = one_of(cases("hybrid", **LIZARD))
    here = slice(EVEN[rank.at], EVEN[rank.at + 1])
    whole = attend(case, slice(None))[0]
    check("o", attend(case, here, context_group=rank.all)[0], whole[:, here], 1e-9)


@case_of_ranks
def some_gradients(rank):
    """Frozen keys and values, as where only a gate learns."""
    case = one_of(cases("hybrid", **LIZARD))
    here = slice(EVEN[rank.at], EVEN[rank.at + 1])
    g = case.tokens["g"].clone().requires_grad_()
    case = case.map(lambda name, x: g if name == "g" else x)
    wanted = torch.autograd.grad(attend(case, slice(None))[0].sum(), g)[0]
    found = torch.autograd.grad(attend(case, here, context_group=rank.all)[0].sum(), g)[0]
    check("d g", found[:, here], wanted[:, here], 1e-9)


@case_of_ranks
def wrong_groups(rank):
    case = one_of(cases("window", T=8))
    others = dist.new_group([0, 1])
    for group in (rank.mesh, *([others] if rank.at > 1 else [])):
        try:
            attend(case, slice(None), context_group=group)
        except ValueError as error:
            assert "a DeviceMesh of one dimension" in str(error)
        else:
            raise AssertionError(f"{group} was taken")


def main(at: int, folder: str) -> None:
    """Process ``at`` of the four: runs every case and leaves what failed."""
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)  # of a rank that waits for one that failed
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=at, world_size=RANKS, timeout=limit)
    rank = Rank(
        at, init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context")), init_device_mesh("cpu", (RANKS,))
    )
    failed = {}
    for name, run in CASES.items():
        try:
            run(rank)
        except Exception:
            failed[name] = traceback.format_exc()
    torch.save(failed, f"{folder}/{at}.pt")
    dist.barrier()
    dist.destroy_process_group()
