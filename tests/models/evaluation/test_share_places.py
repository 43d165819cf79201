"""Places within a budget: no other table saves more, whatever the errors are."""

import functools
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lizard_models.evaluation.share_places import savings_hull, share_places

LEVELS = [0, 8, 16, 32]


@functools.cache
def saved_by(curve, places):
    """The most that a chord between two measured numbers of places says, or any fewer places."""
    saved = [(n, curve[0] - error) for n, error in zip(LEVELS, curve, strict=True)]
    chords = [
        x + (y - x) * (m - a) / (b - a)
        for (a, x), (b, y) in itertools.combinations(saved, 2)
        for m in range(0, places + 1, 8)
        if a <= m <= b
    ]
    return max(0.0, *chords)


def total(errors, table):
    heads = ((curve, n) for layer, row in zip(errors, table, strict=True) for curve, n in zip(layer, row, strict=True))
    return sum(saved_by(tuple(curve), n) for curve, n in heads)


def tables(shape, most=32):
    """Every table of so many heads a layer, in steps of 8 places."""
    for flat in itertools.product(range(0, most + 1, 8), repeat=sum(shape)):
        numbers = iter(flat)
        yield [tuple(next(numbers) for _ in range(heads)) for heads in shape]


CURVE = st.lists(st.integers(0, 40), min_size=4, max_size=4, unique=True)  # of any form, rising ones too
ERRORS = st.tuples(st.tuples(CURVE, CURVE), st.tuples(CURVE))  # of three heads in two layers


@settings(max_examples=100, deadline=None, derandomize=True)
@given(ERRORS, st.integers(0, 4000))
def test_no_table_within_the_budget_saves_more(errors, budget):
    """One price for every place."""
    price = 40
    table = share_places(errors, LEVELS, budget, [price] * len(errors), [0] * len(errors))
    used = sum(price * n for row in table for n in row)
    assert used <= budget and [len(row) for row in table] == [len(layer) for layer in errors]
    affordable = (
        t for t in tables([len(layer) for layer in errors]) if sum(price * n for row in t for n in row) <= budget
    )
    assert total(errors, table) == pytest.approx(max(total(errors, t) for t in affordable))
    for layer, row in zip(errors, table, strict=True):  # none where they save nothing
        assert all(n <= savings_hull(LEVELS, curve)[-1][0] for curve, n in zip(layer, row, strict=True))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(ERRORS, st.integers(0, 9000), st.tuples(st.integers(20, 90), st.integers(20, 90)))
def test_with_other_prices_it_is_one_step_short_at_most(errors, budget, prices):
    prices = list(prices)[: len(errors)]
    table = share_places(errors, LEVELS, budget, prices, [0] * len(errors))

    def cost(t):
        return sum(price * n for price, row in zip(prices, t, strict=True) for n in row)

    assert cost(table) <= budget
    best = max(total(errors, t) for t in tables([len(layer) for layer in errors]) if cost(t) <= budget)
    curves = [tuple(curve) for layer in errors for curve in layer]
    step = max(saved_by(curve, n + 8) - saved_by(curve, n) for curve in curves for n in range(0, 32, 8))
    assert best - total(errors, table) <= step + 1e-9


@settings(max_examples=25, deadline=None, derandomize=True)
@given(ERRORS, st.integers(0, 5000), st.integers(0, 900))
def test_layers_with_places_pay_for_them(errors, budget, once):
    table = share_places(errors, LEVELS, budget, [40] * len(errors), [once] * len(errors))
    assert sum(40 * sum(row) + once * any(row) for row in table) <= budget


def test_what_a_layer_without_places_would_pay_goes_to_the_others():
    errors = [[[9.0, 5.0, 2.0, 1.0]], [[0.1, 0.09, 0.08, 0.07]]]
    assert share_places(errors, LEVELS, 40 * 32 + 100, [40, 40], [100, 100]) == [(32,), (0,)]
    assert share_places(errors, LEVELS, 99, [40, 40], [100, 100]) == [(0,), (0,)]
    assert share_places(errors, LEVELS, 40 * 8 + 100, [40, 40], [100, 100]) == [(8,), (0,)]
    assert share_places([[[1.0, 1, 1, 1]], [[2.0, 3, 4, 5]]], LEVELS, 10**6, [1, 1], [1, 1]) == [(0,), (0,)]


def test_the_hull_goes_over_what_saves_late():
    assert savings_hull([0, 1, 2, 4], [4.0, 4.0, 4.0, 0.0]) == [(0, 0.0), (4, 4.0)]
    assert savings_hull([0, 1, 2, 4], [4.0, 1.0, 0.5, 0.6]) == [(0, 0.0), (1, 3.0), (2, 3.5)]
    assert savings_hull([0, 1, 2, 4], [4.0, 3.5, 1.0, 0.5]) == [(0, 0.0), (2, 3.0), (4, 3.5)]
    assert savings_hull([0, 1], [1.0, 2.0]) == [(0, 0.0)]


def test_levels_and_errors_that_do_not_fit_are_refused():
    for levels in ([8, 16], [0, 16, 8], [0, 12], []):
        with pytest.raises(ValueError, match="levels must rise from 0 in multiples of 8"):
            share_places([[[1.0] * len(levels)]], levels, 100, [1], [0])
    with pytest.raises(ValueError, match="errors must be one for each of the 4 levels"):
        share_places([[[1.0, 2.0]]], LEVELS, 100, [1], [0])
