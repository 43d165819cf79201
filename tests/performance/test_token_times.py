"""Tokens timed one by one, lengths in turn, and what ``nvidia-smi`` says meanwhile."""

import argparse
import sys
from types import SimpleNamespace

import pytest
import token_times
import torch
from generate import build
from token_times import WARM, Chip, TokenClock, Writer, flatness, in_turns, parsed

from lizard_models import LizardConfig, linearize


@pytest.fixture(scope="module")
def model():
    teacher = build(argparse.Namespace(shape="tiny", layers=1, device="cpu"))
    return linearize(teacher, LizardConfig.preset("plain")).eval().requires_grad_(False)


def writer(model, length):
    ids = torch.randint(1, 64, (2, length), generator=torch.Generator().manual_seed(length))
    cache = model(ids, use_cache=True).past_key_values
    return Writer(model, cache, torch.cat([ids, torch.ones(2, 1, dtype=torch.long)], 1))


def test_each_token_is_timed_and_no_score_is_changed(model):
    clocked, plain = writer(model, 30), writer(model, 30)
    clock = TokenClock()
    clocked.call(WARM + 4, clock)
    plain.call(WARM + 4)
    assert torch.equal(clocked.ids, plain.ids) and clocked.ids.shape[1] == 31 + WARM + 4
    assert len(clock.stamps) == WARM + 4 and len(clock.seconds()) == 3 and min(clock.seconds()) > 0


def test_a_token_that_is_slow_while_others_count_is_no_mean(model, monkeypatch):
    """The median of the tokens that count: neither the first ones nor one that the host held up."""
    times = iter([0.0, 9.0, 18.0, 27.0, *(28.0 + n for n in range(6)), 90.0])
    monkeypatch.setattr(token_times.time, "perf_counter", lambda: next(times))
    clock = TokenClock()
    for _ in range(11):
        clock(None, None)
    assert clock.seconds() == [1.0] * 5 + [57.0]


def test_lengths_take_turns_forwards_and_backwards(model, monkeypatch):
    writers, order = [writer(model, n) for n in (20, 40)], []
    turn = Writer.turn
    monkeypatch.setattr(Writer, "turn", lambda self, n: order.append(writers.index(self)) or turn(self, n))
    in_turns(writers, 4, 3)
    assert order == [0, 1, 1, 0, 0, 1, 1, 0]
    rows = [each.row() for each in writers]
    for row in rows:
        low, high = row["quartiles_ms"]
        assert len(row["turns_ms"]) == 4 and 0 < low <= row["ms_token"] <= high
        assert row["tokens_s"] == pytest.approx(2e3 / row["ms_token"]) and "chip" not in row
    assert flatness(rows).startswith("slowest over fastest length ") and "replays" not in flatness(rows)


def test_growth_is_told_from_a_slower_chip():
    def row(ms, replay, *mhz, reasons=()):
        chip = [{"sm_mhz": m, "reasons": list(reasons)} for m in mhz]
        return {"ms_token": ms, "turns_ms": [ms, 1.01 * ms], "replay_ms": replay, "chip": chip}

    held = flatness([row(6.0, 5.0, 1980.0), row(6.6, 5.5, 1500.0, reasons=["power cap"])])
    assert "length 1.100; turns of one length 1.010; replays alone 1.100" in held
    assert "SM clock 1500 to 1980 MHz (power cap)" in held
    grown = flatness([row(6.0, 5.0, 1980.0), row(6.6, 5.0, 1980.0)])
    assert "replays alone 1.000" in grown and "(nothing holds it)" in grown
    assert flatness([row(6.0, 5.0, 1980.0)]) == ""


def test_what_nvidia_smi_says(monkeypatch):
    found = parsed("1980, 2619, 412.33, 45, 0x0000000000000024")
    assert found == {
        "sm_mhz": 1980.0, "memory_mhz": 2619.0, "watts": 412.33, "celsius": 45.0, "reasons": ["power cap", "thermal"]
    }  # fmt: skip
    assert parsed("[N/A], 2619, [N/A], 45, 0x0")["sm_mhz"] is None
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="12-34"))
    popen, asked = token_times.subprocess.Popen, []

    def instead(command, **options):
        asked.append(command)
        return popen([sys.executable, "-c", script], **options)

    monkeypatch.setattr(token_times.subprocess, "Popen", instead)
    script = "print('1980, 2619, 412.33, 45, 0x0')"
    assert Chip().read()["sm_mhz"] == 1980.0 and asked[0][:3] == ["nvidia-smi", "-i", "GPU-12-34"]
    script = "import sys; sys.exit('no devices were found')"
    failed = Chip().read()
    assert failed == {"failed": "no devices were found"}
    rows = [{"ms_token": 1.0, "turns_ms": [1.0], "chip": [failed]}] * 2
    assert flatness(rows).endswith("nvidia-smi: no devices were found")
