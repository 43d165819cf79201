"""Sources with weights: how many sequences of each an epoch has, which, and what is refused."""

from collections import Counter

import numpy as np
import pytest

from lizard_models.text import sequences as text
from lizard_models.text.mixture import MixedTokens, load_mixture, shares
from lizard_models.text.sequences import PackedTokens


def part(start: int, count: int) -> PackedTokens:
    """Sequences of two equal tokens, which are start, start + 1, ..."""
    return PackedTokens(np.repeat(np.arange(start, start + count, dtype=np.uint16), 2), 2)


def rows(mixed) -> list[int]:
    found = [mixed[i]["input_ids"].tolist() for i in range(len(mixed))]
    assert all(one == two for one, two in found)
    return [one for one, _ in found]


def test_shares_add_up():
    draw = np.random.default_rng(0)
    for _ in range(100):
        weights, total = draw.exponential(size=draw.integers(1, 6)), int(draw.integers(1, 50))
        found = shares(weights.tolist(), total)
        exact = total * weights / weights.sum()
        assert sum(found) == total and np.abs(np.array(found) - exact).max() < 1
    assert shares([1, 1, 1], 10) == [4, 3, 3] and shares([3, 1], 8) == [6, 2]


def test_an_epoch_has_each_source_by_its_weight():
    mixed = MixedTokens([part(0, 4), part(100, 12)], [3, 1], seed=5)
    found = Counter(rows(mixed))
    assert mixed.counts == [12, 4] and len(mixed) == 16
    assert [found[i] for i in range(4)] == [3, 3, 3, 3]  # of the small source each as often as the others
    assert sum(n for i, n in found.items() if i >= 100) == 4 and max(n for i, n in found.items() if i >= 100) == 1
    uneven = Counter(rows(MixedTokens([part(0, 5), part(100, 5)], [7, 3])))
    assert sorted(uneven[i] for i in range(5)) == [1, 1, 1, 2, 2]
    assert sorted(mixed.sequences[:, 0].tolist()) == sorted(found)  # what is read, once, and nothing else
    once = mixed.once()
    assert rows(once) == list(dict.fromkeys(rows(mixed))) and len(mixed) == 16


def test_the_seed_fixes_it_and_the_digest_knows_it():
    parts = [part(0, 40), part(100, 20)]
    one, same, other = (MixedTokens(parts, [1, 2], seed) for seed in (0, 0, 1))
    assert rows(one) == rows(same) != rows(other)
    assert sorted(rows(one)) != rows(one)  # mixed, not one source after the other
    weighed = MixedTokens(parts, [1, 1])
    changed = MixedTokens([parts[0], part(101, 20)], [1, 2])
    assert one.digest == same.digest and len({one.digest, other.digest, weighed.digest, changed.digest}) == 4
    assert MixedTokens(parts, [2, 4]).digest == one.digest  # proportions count


def test_sources_are_files(tmp_path, monkeypatch):
    for name, start, count in (("a", 0, 6), ("b", 50, 2)):
        np.save(tmp_path / f"{name}.npy", np.repeat(np.arange(start, start + count), 2))
    sources = [str(tmp_path / "a.npy"), str(tmp_path / "b.npy")]
    mixed = load_mixture(sources, [1, 3], None, 2, seed=1, vocab_size=97)
    assert mixed.counts == [2, 6] and Counter(n >= 50 for n in rows(mixed)) == {True: 6, False: 2}
    plain = load_mixture(sources, [], None, 2, seed=1, vocab_size=97)
    assert sorted(rows(plain)) == [*range(6), 50, 51]
    with pytest.raises(ValueError, match=r"weights: got \[1, 100\], of which 1 gives none of 8 sequences"):
        load_mixture(sources, [1, 100], None, 2, vocab_size=97)
    with pytest.raises(ValueError, match=r"data: 4 tokens are fewer than one sequence.*\(of '.*b\.npy', which has"):
        load_mixture(sources, [1, 1], None, 6, vocab_size=97)
    monkeypatch.setattr(text, "STREAM_FROM_BYTES", 0)
    with pytest.raises(ValueError, match=r"weights: '.*a\.npy' is streamed, so the number"):
        load_mixture(sources, [1, 1], None, 2, vocab_size=97)
