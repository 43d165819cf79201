"""Check and time decode steps and prefill in pieces with kept keys: ``kept.py --decode`` runs this.

A step is timed in a CUDA graph of steps on several states, together larger than the caches, beside the time that the
bytes it must move would take at the speed of a copy.
"""

from __future__ import annotations

import traceback
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from shapes import ANCHORS, HEAD_DIM, HEADS, KEY_HEADS, PRE_FEATURES
from timing import median_ms
from torch import Tensor

import lizard_ops
from lizard_ops import AttentionState
from lizard_ops.hybrid_attn.triton import decode
from lizard_ops.tiles.launch import Launch


def by_head(places: int) -> list[int]:
    """As many places in all, where every other head has none."""
    return [2 * places * (h % 2 == 0) for h in range(KEY_HEADS)]


MERGE: dict[str, Any] = {"mix": "merge", "coverage": "outside", "feature_map": "softmax"}
CHECKS: dict[str, tuple[torch.dtype, int, dict[str, Any]]] = {  # name: (dtype, gates, options)
    "merge bf16": (torch.bfloat16, KEY_HEADS, MERGE),
    "merge bf16, one gate": (torch.bfloat16, 1, MERGE),
    "sum all fp16": (torch.float16, KEY_HEADS, MERGE | {"mix": "sum", "coverage": "all"}),
    "exp fp32, gate a query head": (torch.float32, HEADS, MERGE | {"feature_map": "exp"}),
    "places per head bf16": (torch.bfloat16, KEY_HEADS, MERGE | {"kept_keys": by_head(96)}),
    "places per head exp fp32": (torch.float32, HEADS, MERGE | {"feature_map": "exp", "kept_keys": by_head(96)}),
}
WINDOW, PLACES, PIECE, LENGTH = 384, 256, 4096, 32768
LAYERS = {1: 24, 16: 4, 64: 2}  # states for each batch
READ = ("ring_k", "ring_v", "ring_g", "anchor_k", "anchor_v", "kept_k", "kept_v", "kept_scores", "kept_positions")
UPDATED = ("s", "z", "log_scale", "kept_g")  # read and written; of other fields a step moves a row
Tokens = dict[str, Any]


def tokens(batch: int, length: int, dtype: torch.dtype, gates: int, seed: int = 0) -> Tokens:
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(batch, length, *shape, generator=generator, device="cuda").to(kind)

    x = {"q": normal(HEADS, HEAD_DIM), "k": normal(KEY_HEADS, HEAD_DIM), "v": normal(KEY_HEADS, HEAD_DIM)}
    x |= {"fq": normal(HEADS, PRE_FEATURES), "fk": normal(KEY_HEADS, PRE_FEATURES)}
    x["g"] = F.logsigmoid(normal(gates, kind=torch.float32) + 4)
    return x | {"scores": normal(KEY_HEADS, kind=torch.float32)}


def part(x: Tokens, a: int, b: int) -> Tokens:
    return {name: t[:, a:b] for name, t in x.items()}


def cast(x: Tokens, dtype: torch.dtype) -> Tokens:
    return {name: t if name == "scores" else t.to(dtype) for name, t in x.items()}


def run(x: Tokens, cuts: list[int], steps: int, impl: str, **options: Any) -> tuple[Tensor, AttentionState]:
    """Pieces between the cuts, then the last ``steps`` tokens one by one, in place by the kernel."""
    length, state, outputs = x["q"].shape[1], None, []
    ends = [0, *cuts, length - steps]
    for a, b in zip(ends[:-1], ends[1:], strict=True):
        o, state = lizard_ops.chunk_hybrid_attn(
            **part(x, a, b), initial_state=state, output_final_state=True, impl=impl, **options
        )
        outputs.append(o)
    state = AttentionState(*(None if t is None else t.contiguous() for t in state))
    for t in range(length - steps, length):
        o, state = lizard_ops.recurrent_hybrid_attn(
            **part(x, t, t + 1), initial_state=state, output_final_state=True, inplace=impl == "triton", impl=impl,
            **options,
        )  # fmt: skip
        outputs.append(o)
    return torch.cat(outputs, 1), state


def same_sums(state: AttentionState) -> dict[str, Tensor]:
    """s and z times their scale."""
    scale = 1.0 if state.log_scale is None else state.log_scale.double().exp()[..., None]
    return {"s": state.s.double() * (scale if isinstance(scale, float) else scale[..., None]), "z": state.z * scale}


@torch.no_grad()
def check(name: str, length: int = 900, steps: int = 40, places: int = 96) -> dict[str, Any]:
    """Relative RMS errors of pieces, steps and sums, of the kernels and of PyTorch; positions; two runs bit for bit."""
    dtype, gates, kind = CHECKS[name]
    x = tokens(2, length, dtype, gates)
    x["scores"] = (x["scores"] + torch.arange(length, device="cuda").view(1, -1, 1) / 256).round()
    options = {"window": 128, "anchors": ANCHORS, "kept_keys": places, "score_delay": 2} | kind
    forms = {"exact": (torch.float64, "torch"), "torch": (dtype, "torch"), "ours": (dtype, "triton")}
    forms["again"] = forms["ours"]
    found = {}
    for form, (working, impl) in forms.items():
        o, state = run(cast(x, working) if form == "exact" else x, [300, 301], steps, impl, **options)
        found[form] = {"pieces": o[:, :-steps], "steps": o[:, -steps:], **same_sums(state)}, state

    def errors(form: str) -> dict[str, float]:
        pairs = ((n, found[form][0][n].double(), t) for n, t in found["exact"][0].items())
        return {n: ((mine - t).norm() / t.norm().clamp_min(1e-30)).item() for n, mine, t in pairs}

    held, wanted = (found[form][1].kept_positions.sort(1)[0] for form in ("ours", "exact"))
    again = all(torch.equal(a, found["again"][0][n]) for n, a in found["ours"][0].items())
    return {"ours": errors("ours"), "torch": errors("torch"), "positions": torch.equal(held, wanted), "same": again}


def filled(batch: int, places: int | list[int], options: dict[str, Any]) -> AttentionState:
    """A state long past full."""
    nothing = part(tokens(batch, 1, torch.bfloat16, KEY_HEADS), 0, 0)
    if not places:
        nothing.pop("scores")
    _, state = lizard_ops.recurrent_hybrid_attn(**nothing, output_final_state=True, impl="torch", **options)
    for name, x in state._asdict().items():
        if x is not None and x.is_floating_point():
            x.copy_(torch.rand_like(x) if "g" != name[-1] else -torch.rand_like(x) / 64)
    state.position.fill_(5000)
    if isinstance(places, list):
        state.kept_positions.copy_(torch.cat([torch.arange(n, device="cuda") for n in places]) * 8 + ANCHORS)
    elif places:
        state.kept_positions.copy_(torch.arange(places, device="cuda").view(1, -1, 1) * 16 + ANCHORS)
    return state


def copy_speed() -> float:
    """Bytes a millisecond, read and written."""
    x = torch.empty(2**28, dtype=torch.float32, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() * 4 / median_ms(lambda: y.copy_(x), 50, graph=True)


@torch.no_grad()
def timed_step(batch: int, places: int | list[int], speed: float, milliseconds: int) -> dict[str, Any]:
    options = MERGE | {"window": WINDOW, "anchors": ANCHORS} | ({"kept_keys": places} if places else {})
    states = [filled(batch, places, options) for _ in range(LAYERS[batch])]
    x = tokens(batch, 1, torch.bfloat16, KEY_HEADS)
    if not places:
        x.pop("scores")

    def steps() -> None:
        for state in states:
            lizard_ops.recurrent_hybrid_attn(
                **x, initial_state=state, output_final_state=True, inplace=True, impl="triton", **options
            )

    ms = median_ms(steps, milliseconds, graph=True) / len(states)
    sizes = {n: t.numel() * t.element_size() for n, t in states[0]._asdict().items() if t is not None}
    moved = sum(sizes.get(n, 0) for n in READ) + 2 * sum(sizes.get(n, 0) for n in UPDATED)
    return {"batch": batch, "kept": places, "us": ms * 1e3, "MB": moved / 1e6, "times_copy": ms / (moved / speed)}


def variants(speed: float, milliseconds: int) -> dict[str, Any]:
    """The step of batch 64 with other launch configurations than the table's."""
    table, found = decode.config_for, {}
    for columns, stages, registers in ((64, 2, 128), (64, 2, 168), (64, 3, 128), (32, 2, 128), (32, 3, 128)):
        config = Launch(32, columns, 4, stages, registers)
        decode.config_for = lambda *_, config=config: config
        name = f"columns {columns}, stages {stages}, registers {registers}"
        found[name] = guarded(partial(timed_step, 64, PLACES, speed, milliseconds))
    decode.config_for = table
    return found


@torch.no_grad()
def timed_prefill(places: int, piece: int, milliseconds: int) -> float:
    """Milliseconds of LENGTH tokens in pieces that hand a state on."""
    x = tokens(1, LENGTH, torch.bfloat16, KEY_HEADS)
    options = MERGE | {"window": WINDOW, "anchors": ANCHORS} | ({"kept_keys": places} if places else {})
    if not places:
        x.pop("scores")
    parts = [part(x, a, a + piece) for a in range(0, LENGTH, piece)]

    def pieces() -> None:
        state = None
        for now in parts:
            _, state = lizard_ops.chunk_hybrid_attn(
                **now, initial_state=state, output_final_state=True, impl="triton", **options
            )

    pieces()
    return median_ms(pieces, milliseconds, graph=True)


def measure(milliseconds: int, others: bool) -> dict[str, Any]:
    """Everything; what fails shows its error in its place. others: launch configurations too."""
    found: dict[str, Any] = {"checks": {}, "steps": [], "prefill_ms": {}}
    for name in CHECKS:
        found["checks"][name] = guarded(partial(check, name))
    speed = copy_speed()
    found["copy_TB_s"] = speed / 1e9
    for batch in LAYERS:
        for places in (0, PLACES, by_head(PLACES)):
            found["steps"].append(guarded(partial(timed_step, batch, places, speed, milliseconds)))
            torch.cuda.empty_cache()
    found["variants"] = variants(speed, milliseconds) if others else {}
    for places in (0, PLACES):
        for piece in (LENGTH, PIECE):
            run = partial(timed_prefill, places, piece, milliseconds)
            found["prefill_ms"][f"kept {places}, pieces of {piece}"] = guarded(run)
    return found


def guarded(run: Any) -> Any:
    try:
        return run()
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:200]}


def print_table(found: dict[str, Any]) -> None:
    for name, row in found["checks"].items():
        if "error" in row:
            print(f"{name}: {row['error']}")
            continue
        errors = "  ".join(f"{n} {e:.1e} ({row['torch'][n]:.1e})" for n, e in row["ours"].items())
        wrong = "" if row["positions"] and row["same"] else "  WRONG PLACES OR TWO RUNS DIFFER"
        print(f"{name}: error (PyTorch's) {errors}{wrong}")
    print(f"copy {found['copy_TB_s']:.2f} TB/s; a step: microseconds, megabytes, times the copy's")
    for row in found["steps"]:
        numbers = "  ".join(f"{x:8.2f}" for n, x in row.items() if n in ("us", "MB", "times_copy"))
        print(row["error"] if "error" in row else f"batch {row['batch']:3d} kept {row['kept']!s:>3}  {numbers}")
    for name, row in found["variants"].items():
        print(f"batch 64 kept {PLACES}, {name}: {row.get('us', row)}")
    for name, ms in found["prefill_ms"].items():
        print(f"prefill {LENGTH} {name}: {ms if isinstance(ms, dict) else f'{ms:.2f} ms'}")
