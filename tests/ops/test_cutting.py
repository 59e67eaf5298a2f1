"""Runs of length-sorted rows, against all ways to cut them."""

import itertools
import random

import pytest

from egspo_lightning.ops.cutting import cut_evenly, cut_within


def all_cuts(lengths):
    """Every way to cut the sorted lengths into runs that hold a row each."""
    ordered = sorted(lengths)
    for number in range(len(ordered)):
        for places in itertools.combinations(range(1, len(ordered)), number):
            bounds = [0, *places, len(ordered)]
            yield [ordered[a:b] for a, b in itertools.pairwise(bounds)]


def random_lengths(seed):
    rng = random.Random(seed)
    return [rng.randint(2, 30) for _ in range(rng.randint(1, 9))]


def of(runs, lengths):
    return [[lengths[row] for row in run] for run in runs]


@pytest.mark.parametrize("seed", range(40))
def test_no_other_cut_within_the_bound_has_fewer_runs(seed):
    lengths = random_lengths(seed)
    most = random.Random(-seed - 1).randint(max(lengths), 2 * max(lengths) + 10)
    runs = of(cut_within(lengths, most), lengths)
    fits = [cut for cut in all_cuts(lengths) if max(map(sum, cut)) <= most]
    assert runs in fits
    assert len(runs) == min(map(len, fits))


@pytest.mark.parametrize("seed", range(40))
def test_no_other_cut_into_so_many_has_a_smaller_largest_run(seed):
    lengths = random_lengths(seed)
    for parts in range(1, len(lengths) + 3):
        runs = cut_evenly(lengths, parts)
        assert len(runs) == parts
        assert sorted(itertools.chain(*runs)) == list(range(len(lengths)))
        filled = [run for run in of(runs, lengths) if run]
        assert list(itertools.chain(*filled)) == sorted(lengths)
        least = min(max(map(sum, cut)) for cut in all_cuts(lengths) if len(cut) <= parts)
        assert max(map(sum, filled)) == least


def test_by_hand():
    """Cut by rows, the two longest would stand together: 19 tokens."""
    assert of(cut_evenly([10, 2, 9, 3], 2), [10, 2, 9, 3]) == [[2, 3, 9], [10]]
    assert of(cut_within([10, 2, 9, 3], 13), [10, 2, 9, 3]) == [[2, 3], [9], [10]]


def test_equal_lengths_keep_their_order_and_without_rows_all_runs_are_empty():
    assert cut_evenly([4, 3, 4, 3], 1) == [[1, 3, 0, 2]]
    assert cut_evenly([], 3) == [[], [], []]
    assert cut_within([], 5) == []


def test_a_row_that_no_run_can_hold_is_our_own_mistake():
    with pytest.raises(AssertionError, match="longer than a run may be"):
        cut_within([3, 8], 7)
