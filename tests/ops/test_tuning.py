"""Tuned launch configurations: measured where asked, kept in a file, used where asked, and nowhere else."""

from __future__ import annotations

import json
import threading
from typing import NamedTuple

import pytest
import torch
from kernel_checks import DEVICE

import lizard_ops
from lizard_ops import tuning


class Config(NamedTuple):
    rows: int
    num_warps: int
    num_stages: int
    registers: int | None = None


@tuning.tunable("test")
def config_of(kernel: str, dim: int) -> Config:
    return Config(64, 4, 1, 168 if kernel == "query" else None)


@tuning.tunable("test", fixed=("num_warps", "registers"))
def fixed_config_of(kernel: str) -> Config:
    return Config(32, 4, 2)


@pytest.fixture(autouse=True)
def tables_afterwards():
    yield
    lizard_ops.use_tuned(enabled=False)


TIMES = {4: 1.0, 8: 0.5, 2: 2.0}


def call():
    """Its time is that of the configuration of "key"; "query" is as fast in any."""
    call.config, call.query = config_of("key", 16), config_of("query", 16)
    return {"o": torch.ones(3)}


def fake_time(run):
    run()
    return TIMES[call.config.num_warps] + 0.01 * call.config.num_stages


def test_the_best_is_stored_and_used_only_where_asked(tmp_path):
    path = tmp_path / "new" / "launches.json"
    found = lizard_ops.tune(call, path, measure=fake_time)
    assert found == {"test key 16": tuning.Choice({"num_warps": 8}, 1.01, 0.51)}
    assert config_of("key", 16).num_warps == 4
    assert lizard_ops.use_tuned(path) == 1
    assert config_of("key", 16) == Config(64, 8, 1) and config_of("key", 32) == Config(64, 4, 1)
    other = []  # as autograd launches backward kernels
    thread = threading.Thread(target=lambda: other.append(config_of("key", 16)))
    thread.start()
    thread.join()
    assert other[0].num_warps == 8
    assert lizard_ops.use_tuned(enabled=False) == 0
    assert config_of("key", 16).num_warps == 4


def test_the_file_keeps_other_shapes_and_chips(tmp_path, monkeypatch):
    path = tmp_path / "launches.json"
    with monkeypatch.context() as patched:
        patched.setattr(tuning, "chip", lambda: "another chip")
        lizard_ops.tune(call, path, measure=fake_time)
    assert lizard_ops.use_tuned(path) == 0  # nothing is known of this chip
    lizard_ops.tune(lambda: (config_of("key", 128), call())[1], path, measure=fake_time)
    content = json.loads(path.read_text())
    assert set(content["chips"]) == {"another chip", tuning.chip()}
    assert [x.name for x in tmp_path.iterdir()] == ["launches.json"]


def test_a_second_run_replaces_what_it_measured(tmp_path, monkeypatch):
    path = tmp_path / "launches.json"
    lizard_ops.tune(call, path, measure=fake_time)
    monkeypatch.setitem(TIMES, 8, 3.0)
    assert lizard_ops.tune(call, path, measure=fake_time) == {}
    assert lizard_ops.use_tuned(path) == 0


def test_wrong_results_and_failed_launches_are_never_chosen(tmp_path, monkeypatch):
    def wrong():
        call()
        return torch.full((3,), 1.0 + (call.config.num_warps == 8))

    assert lizard_ops.tune(wrong, tmp_path / "a.json", measure=fake_time) == {}

    def fails():
        if call()["o"].numel() and call.config.num_warps == 8:
            raise RuntimeError("out of resource: shared memory")
        return torch.ones(3)

    assert lizard_ops.tune(fails, tmp_path / "b.json", measure=fake_time) == {}


def test_files_of_before_name_the_fields_as_they_were(tmp_path):
    """Some kernels' warps and stages were called num_warps and num_stages."""
    path = tmp_path / "launches.json"
    kernels = pytest.importorskip("lizard_ops.gated_attn.triton.config")
    asked = ("state", 64, 64, 1, 64, 2)
    table = kernels.launch(*asked)
    entry = {"fields": {"num_warps": 2, "num_stages": 3}, "before": 1.0, "after": 0.5}
    key = " ".join(map(str, ("gated", *asked)))
    path.write_text(json.dumps({"format": 1, "chips": {tuning.chip(): {key: entry}}}))
    assert lizard_ops.use_tuned(path) == 1
    assert kernels.launch(*asked) == table._replace(warps=2, stages=3)


def test_choices_are_one_step_away_and_leave_what_is_fixed():
    steps = tuning.neighbours(config_of("query", 16))
    assert steps == [{"num_warps": 2}, {"num_warps": 8}, {"num_stages": 2}, {"registers": None}, {"registers": 128}]
    assert tuning.neighbours(config_of("key", 16))[-1] == {"registers": 168}
    steps = tuning.neighbours(fixed_config_of("x"), ("num_warps", "registers"))
    assert steps == [{"num_stages": 1}, {"num_stages": 3}]


def test_a_limit_and_what_is_left_out(tmp_path):
    path, asked = tmp_path / "launches.json", []
    assert lizard_ops.tune(call, path, measure=fake_time, seconds=0.0) == {}

    def leave_out(key, fields):
        asked.append((key, fields))
        return fields == {"num_warps": 8}

    assert lizard_ops.tune(call, path, measure=fake_time, leave_out=leave_out) == {}
    assert asked == tuning.candidates(call)


def test_what_was_found_before_a_crash_is_kept(tmp_path):
    def crashes():
        if call()["o"].numel() and call.query.num_warps == 8:
            raise ValueError("as a lost context")
        return torch.ones(3)

    path = tmp_path / "launches.json"
    with pytest.raises(ValueError):
        lizard_ops.tune(crashes, path, measure=fake_time)
    assert lizard_ops.use_tuned(path) == 1 and config_of("key", 16).num_warps == 8
    lizard_ops.use_tuned(enabled=False)
    left = lizard_ops.tune(call, path, measure=fake_time, leave_out=lambda key, fields: key == "test key 16")
    assert left == {} and lizard_ops.use_tuned(path) == 1


def test_a_call_without_kernels_and_a_strange_file_are_refused(tmp_path):
    path = tmp_path / "launches.json"
    with pytest.raises(ValueError, match="call: it launched no Triton kernel"):
        lizard_ops.tune(lambda: torch.ones(1), path, measure=fake_time)
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        lizard_ops.use_tuned(path)
    for content in ("{", '{"format": 1}', '{"format": 9, "chips": {}}', '{"format": 1, "chips": {"a": {"b": 3}}}',
                    '{"format": 1, "chips": {"a": {"b": {"fields": {"rows": 3}}}}}'):  # fmt: skip
        path.write_text(content)
        with pytest.raises(ValueError, match="path: got"):
            lizard_ops.use_tuned(path)
        with pytest.raises(ValueError, match="path: got"):
            lizard_ops.tune(call, path, measure=fake_time)


@pytest.mark.parametrize("op", ["gated", "window", "hybrid", "decode", "project"])
def test_kernels_ask_and_follow(op, tmp_path, monkeypatch):
    """A tuned configuration reaches the kernels of every op, forward and backward, and the results stay."""
    b, t = 1, 1 if op == "decode" else 3
    x = {name: torch.rand(b, t, 2, 16, device=DEVICE) for name in ("q", "k", "v", "fq", "fk")}
    x = {name: y.requires_grad_(op != "decode") for name, y in x.items()}
    g = -torch.rand(b, t, 2, device=DEVICE)

    def run():
        qkv = [x[name] for name in "qkv"]
        if op == "decode":
            return lizard_ops.recurrent_hybrid_attn(*x.values(), g, 4, initial_state=state, impl="triton")[0]
        if op == "project":
            o = lizard_ops.project_heads(
                x["q"], torch.ones(1, 16, 8, device=DEVICE, requires_grad=True), impl="triton"
            )[1]
        elif op == "gated":
            o = lizard_ops.chunk_gated_attn(*qkv, g, impl="triton")[0]
        elif op == "window":
            o = lizard_ops.window_attn(*qkv, 4, impl="triton")[0]
        else:
            o = lizard_ops.chunk_hybrid_attn(*x.values(), g, 4, feature_map="softmax", impl="triton")[0]
        return o, torch.autograd.grad(o.sum(), list(x.values()), allow_unused=True)

    state = None
    if op == "decode":
        state = lizard_ops.chunk_hybrid_attn(*x.values(), g, 4, output_final_state=True)[1]
    monkeypatch.setattr(tuning, "_active", tuning._Active({}, seen={}))
    table = run()
    found = {key: {"fields": tuning.neighbours(config)[-1]} for key, config in tuning._active.seen.items()}
    least = {"gated": 5, "window": 3, "hybrid": 6, "decode": 1, "project": 2}[op]
    asked = (op, "window") if op == "hybrid" else op  # they share the kernel of the keys
    assert len(found) >= least and all(key.startswith(asked) for key in found)
    path = tmp_path / "launches.json"
    path.write_text(json.dumps({"format": tuning.FORMAT, "chips": {tuning.chip(): found}}))
    assert lizard_ops.use_tuned(path) == len(found)
    torch.testing.assert_close(run(), table)


def test_an_op_is_tuned(tmp_path):
    q, k, v = (torch.rand(1, 3, 2, 16, device=DEVICE) for _ in range(3))
    times = iter(range(100, 0, -1))  # the last one is the fastest
    found = lizard_ops.tune(
        lambda: lizard_ops.window_attn(q, k, v, 4, impl="triton")[0],
        tmp_path / "launches.json",
        measure=lambda run: next(times),
    )
    assert [key.split()[:2] for key in found] == [["window", "forward"]]
