"""Mixtures: who is named, how many rows each gets, in which order, and that all of it is a function of (seed, step)."""

import itertools

import numpy as np
import pytest

from lm.core.errors import UserError
from lm.data.batches import batch_function
from lm.data.mixture import (
    COUNTED_STEPS,
    MixtureSource,
    mixture_order,
    mixture_weights,
    parse_sources,
    source_labels,
    systematic_counts,
    weight_at,
)

KINDS = {"stdlib": "code", "chitchat": "forum", "notes": "forum"}
FOREVER = float("inf")


def order(sizes=(50, 50), *, weights=(1.0, 1.0), epochs=None, batch_size=8, seed=3, **more):
    epochs = epochs or [FOREVER] * len(sizes)
    return mixture_order(sizes, weights=weights, epochs=epochs, batch_size=batch_size, seed=seed, **more)


def counts(drawn, steps, sources):
    """i64[steps, sources]"""
    return np.array([np.bincount(drawn(i).source, minlength=sources) for i in range(steps)])


# Names and weights


def test_a_string_is_one_source_and_a_list_is_several():
    assert parse_sources("stdlib,chitchat", KINDS) == [MixtureSource("stdlib,chitchat")]  # a pool of two kinds has none
    assert parse_sources("chitchat,notes", KINDS) == [MixtureSource("chitchat,notes", kind="forum")]
    given = [{"source": "stdlib", "weight": 2}, {"source": "my/books", "weight": 1.5, "kind": "book", "epochs": 4}]
    assert parse_sources(given, KINDS) == [
        MixtureSource("stdlib", 2.0, "code"),
        MixtureSource("my/books", 1.5, "book", 4),
    ]
    schedule = {"source": "stdlib", "weight": [[0, 1.0], [100, 0.0]]}
    assert parse_sources((schedule, {"source": "a", "weight": 1}), KINDS)[0].weight == ((0, 1.0), (100, 0.0))


@pytest.mark.parametrize(
    "given, message",
    [
        ("", "data.sources names no source: give a file"),
        ([], r"data.sources is \[\]; it must be text, or a list"),
        ([{"weight": 1}], r"data.sources\[0\] is {'weight': 1}; it must be a mapping such as"),
        ([{"source": "a", "wieght": 1}], r"data.sources\[0\].wieght is no part of a source .*; did you mean weight\?"),
        ([{"source": "a", "kind": "books"}], "kind is 'books'; choose one of website, book, encyclopedia"),
        ([{"source": "a", "epochs": 0}], "epochs is 0; it must be a number above 0"),
        ([{"source": "a", "weight": -1}], "weight is -1; it must be 0 or more"),
        ([{"source": "a", "weight": "1"}], "weight is '1'; it must be a number, or pairs of a step and a weight"),
        ([{"source": "a", "weight": ((0, 1), (5,))}], "it must be a number, or pairs"),
        ([{"source": "a", "weight": ((9, 1), (5, 1))}], "weight has step 5 after step 9"),
        ([{"source": "a", "weight": ((0, -1),)}], "weight is -1 at step 0; it must be 0 or more"),
        ([{"source": "a"}, {"source": "a"}], "data.sources names 'a' twice"),
        ([{"source": "a", "weight": 1}, {"source": "b"}], "'b' has no weight, though others have"),
        ([{"source": "a", "weight": 0}, {"source": "b", "weight": 0}], "every weight is 0 at step 0"),
        # until step 9 there is a; from step 12 on there is b
        ([{"source": "a", "weight": ((9, 1), (10, 0))}, {"source": "b", "weight": ((11, 0), (12, 1))}], "0 at step 10"),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        parse_sources(given, KINDS)


def test_labels_are_short_where_they_are_clear():
    names = ["data/books.jsonl.gz", "stdlib", "more/web/", "a/x.txt", "b/x.txt", "hf:org/set:train", "stdlib,chitchat"]
    names += ["mine/a:b.txt"]
    assert source_labels([MixtureSource(name) for name in names]) == ["books", "stdlib", "web", *names[3:-1], "a:b"]
    tables = ["facts:x/one.csv", "quiz:x/one.csv", "facts:x/two.csv"]
    assert source_labels([MixtureSource(name) for name in tables]) == [tables[0], "quiz", tables[2]]


def test_a_schedule_is_linear_between_its_points_and_jumps_where_two_share_a_step():
    steps = np.arange(0, 14)
    assert weight_at(2.0, steps).tolist() == [2.0] * 14
    # 1 until step 2, then down to 0 at step 6, and 3 from step 10 on, where it was 0
    points = ((2, 1.0), (6, 0.0), (10, 0.0), (10, 3.0))
    assert weight_at(points, steps).tolist() == [1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0, 3, 3, 3, 3]


def test_weights_by_size_to_a_temperature():
    sources = [MixtureSource("a"), MixtureSource("b")]
    assert mixture_weights(sources, [400, 100], temperature=1.0) == [1.0, 0.25]
    assert mixture_weights(sources, [400, 100], temperature=2.0) == [1.0, 0.5]  # the root of a quarter
    assert mixture_weights([MixtureSource("a", 3.0)], [400], temperature=2.0) == [3.0]
    with pytest.raises(UserError, match="data.source_temperature is 0; it must be above 0"):
        mixture_weights(sources, [400, 100], temperature=0)


# Counts


def test_systematic_sampling_by_hand():
    """Weights 1, 2, 1 and 4 rows: the edges stand at 1, 3, 4 of 4. Rows at u, u + 1, ...: one, two and one for any u.
    5 rows: edges at 1.25, 3.75, 5; with u = 0.2 rows at .2 1.2 | 2.2 3.2 | 4.2, with u = 0.5 .5 | 1.5 2.5 3.5 | 4.5."""
    weights = np.array([[1.0, 2.0, 1.0]] * 2)
    at = lambda rows: systematic_counts(weights, np.array([rows] * 2), np.array([0.2, 0.5])).tolist()
    assert at(4) == [[1, 2, 1], [1, 2, 1]]
    assert at(5) == [[2, 2, 1], [1, 3, 1]]


def test_a_weight_of_zero_gets_no_row_wherever_it_stands():
    weights = np.array([[0.0, 0.1, 0.2, 0.0, 0.7, 0.0]] * 1000)
    found = systematic_counts(weights, np.full(1000, 10), np.random.default_rng(0).random(1000))
    assert (found.sum(axis=1) == 10).all() and not found[:, [0, 3, 5]].any()


def test_a_batch_is_within_one_row_of_its_proportions_and_the_run_near_them():
    drawn, weights = order((50, 50, 50), weights=(0.5, 0.3, 0.2), batch_size=7), np.array([0.5, 0.3, 0.2])
    found = counts(drawn, 200, 3)
    assert (found.sum(axis=1) == 7).all()
    assert (np.abs(found - 7 * weights) < 1).all()
    # Drawn one by one the deviation of 1,400 rows would be sqrt(1400 * .5 * .5) = 19; that of a step is below 0.5 here.
    assert np.abs(found.sum(axis=0) - 1400 * weights).max() < 2 * 0.5 * np.sqrt(200)


def test_a_schedule_moves_the_proportions():
    drawn = order(weights=(((0, 1.0), (100, 0.0)), ((0, 0.0), (100, 1.0))), batch_size=10)
    found = counts(drawn, 120, 2)
    assert found[0].tolist() == [10, 0] and (found[100:] == [0, 10]).all()
    assert (np.abs(found[:100, 1] - np.arange(100) / 10) < 1).all()
    slow = order(weights=(((0, 1.0), (100, 0.0)), ((0, 0.0), (100, 1.0))), batch_size=10, draws_per_step=2)
    assert counts(slow, 220, 2)[200:].tolist() == [[0, 10]] * 20


# Order


def test_one_source_has_the_order_of_the_plain_batches_with_a_ramp_too():
    ramp = ((2, 2), (5, 3))
    for sizes, more in (((10,), {}), ((10,), {"ramp": ramp})):
        plain = batch_function(np.arange(10), batch_size=4, seed=5, **more)
        drawn = order(sizes, weights=(1.0,), batch_size=4, seed=5, **more)
        capped = order(sizes, weights=(1.0,), epochs=[100], batch_size=4, seed=5, **more)
        for i in range(9):
            assert drawn(i).number.tolist() == plain(i).tolist() == capped(i).number.tolist()
    assert [drawn(i).epoch.tolist() for i in (4, 5)] == [[1, 1, 1], [1, 1, 1, 1]]  # rows 10 to 16 of 10


def test_a_batch_is_a_function_of_seed_and_step():
    """In any order of asking, far ahead first; another seed gives another mixture."""
    make = lambda seed: order((40, 30), weights=(0.6, 0.4), epochs=[FOREVER, 900], seed=seed)
    first, second = make(3), make(3)
    steps = [COUNTED_STEPS * 2 + 7, 0, COUNTED_STEPS, COUNTED_STEPS - 1, 5, COUNTED_STEPS * 2 + 7]
    backwards = {i: second(i) for i in sorted(steps)}
    for i in steps:
        for a, b in zip(first(i), backwards[i]):
            np.testing.assert_array_equal(a, b)
    assert any((counts(make(3), 20, 2) != counts(make(4), 20, 2)).any(axis=1))


@pytest.mark.parametrize("epochs", [[FOREVER] * 3, [FOREVER, 2.5, 1]])
def test_a_source_that_is_added_keeps_the_order_of_the_others(epochs):
    """What each source gives, one batch after another, is a beginning of what it gives without the third."""
    two, three = order((40, 30)), order((40, 30, 20), weights=(1.0, 1.0, 0.7), epochs=epochs)
    for source in (0, 1):
        alone, beside = (
            list(itertools.chain.from_iterable(d(i).number[d(i).source == source].tolist() for i in range(25)))
            for d in (two, three)
        )
        assert len(beside) > 20 and beside[: len(alone)] == alone[: len(beside)]


def test_every_epoch_of_a_source_holds_each_of_its_rows_once():
    drawn = order((40, 30), weights=(0.7, 0.3))
    for source, size in ((0, 40), (1, 30)):
        rows = [n for i in range(40) for n in drawn(i).number[drawn(i).source == source].tolist()]
        for start in range(0, len(rows) - size, size):
            assert sorted(rows[start : start + size]) == list(range(size))


# Caps


def test_a_cap_ends_a_source_within_a_batch_and_the_others_fill_it():
    """12 rows seen 1.5 times are 18; half of 8 rows are 4: after four steps 16, then 2 of them and 6 of the other."""
    drawn = order((12, 50), epochs=[1.5, FOREVER])
    found = counts(drawn, 10, 2)
    assert found[:4].tolist() == [[4, 4]] * 4
    assert found[4:].tolist() == [[2, 6]] + [[0, 8]] * 5
    assert max(drawn(i).epoch[drawn(i).source == 0].max(initial=0) for i in range(10)) == 1


def test_the_others_are_renormalised_after_a_cap():
    drawn = order((4, 100, 100), weights=(0.5, 0.375, 0.125), epochs=[1, FOREVER, FOREVER])
    found = counts(drawn, 40, 3)
    assert found[0].tolist() == [4, 3, 1] and not found[1:, 0].any()
    assert (found[1:] == [0, 6, 2]).all()  # 3 to 1


@pytest.mark.parametrize("block", [COUNTED_STEPS, 16])
def test_when_all_are_used_up_the_step_is_named_and_those_before_it_remain(block, monkeypatch):
    """Sizes 12 and 20, each twice: 64 rows are 8 batches of 8, whatever the weights are."""
    monkeypatch.setattr("lm.data.mixture.COUNTED_STEPS", block)
    drawn = order((12, 20), weights=(0.8, 0.2), epochs=[2, 2])
    with pytest.raises(UserError, match="the sources are used up at step 9: every one that has a weight was seen"):
        drawn(8)
    found = counts(drawn, 8, 2)
    assert found.sum(axis=0).tolist() == [24, 40] and (found.sum(axis=1) == 8).all()
    for far in (9, 40, 5000):
        with pytest.raises(UserError, match="used up at step 9"):
            drawn(far)
    with pytest.raises(UserError, match="used up at step 1:"):
        order((3, 3), epochs=[1, 1])(0)


def test_a_source_whose_weight_is_zero_does_not_help_out():
    drawn = order((8, 80), weights=(1.0, ((0, 0.0), (5, 0.0), (6, 1.0))), epochs=[2, FOREVER])
    assert counts(drawn, 2, 2).tolist() == [[8, 0]] * 2
    with pytest.raises(UserError, match="used up at step 3"):
        drawn(2)


def test_caps_hold_across_the_edges_of_blocks(monkeypatch):
    """50 rows seen 3.3 times are 165, 20 seen 5 times are 100; the sums that blocks begin with hold them, in any order
    of asking."""
    monkeypatch.setattr("lm.data.mixture.COUNTED_STEPS", 16)
    make = lambda: order((700, 50, 20), weights=(0.5, 0.3, 0.2), epochs=[FOREVER, 3.3, 5])
    found, drawn = counts(make(), 100, 3), make()
    assert found[:, 1:].sum(axis=0).tolist() == [165, 100] and (found.sum(axis=1) == 8).all()
    assert found[90].tolist() == [8, 0, 0]
    backwards = np.array([np.bincount(drawn(i).source, minlength=3) for i in range(99, -1, -1)])
    assert (backwards[::-1] == found).all()


def test_nothing_to_draw_from():
    with pytest.raises(UserError, match=r"cannot draw batches from sources of \[5, 0\] rows"):
        order((5, 0))
    with pytest.raises(UserError, match="data.batch_size is 0"):
        order(batch_size=0)
