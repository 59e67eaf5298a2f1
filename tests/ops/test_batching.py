"""Batches of rows sorted by length, compared with every possible split."""

import itertools
import random

import pytest

from egspo_lightning.ops.batching import balanced_batches, batches_within, similar_length_batches


def all_splits(lengths):
    """Every split of the sorted lengths into non-empty batches."""
    ordered = sorted(lengths)
    for number in range(len(ordered)):
        for places in itertools.combinations(range(1, len(ordered)), number):
            bounds = [0, *places, len(ordered)]
            yield [ordered[a:b] for a, b in itertools.pairwise(bounds)]


def random_lengths(seed):
    rng = random.Random(seed)
    return [rng.randint(2, 30) for _ in range(rng.randint(1, 9))]


def lengths_of(runs, lengths):
    return [[lengths[row] for row in run] for run in runs]


@pytest.mark.parametrize("seed", range(40))
def test_batches_within_budget_are_the_fewest_possible(seed):
    lengths = random_lengths(seed)
    most = random.Random(-seed - 1).randint(max(lengths), 2 * max(lengths) + 10)
    runs = lengths_of(batches_within(lengths, most), lengths)
    fits = [cut for cut in all_splits(lengths) if max(map(sum, cut)) <= most]
    assert runs in fits
    assert len(runs) == min(map(len, fits))


@pytest.mark.parametrize("seed", range(40))
def test_balanced_batches_minimize_the_largest_batch(seed):
    lengths = random_lengths(seed)
    for parts in range(1, len(lengths) + 3):
        runs = balanced_batches(lengths, parts)
        assert len(runs) == parts
        assert sorted(itertools.chain(*runs)) == list(range(len(lengths)))
        filled = [run for run in lengths_of(runs, lengths) if run]
        assert list(itertools.chain(*filled)) == sorted(lengths)
        least = min(max(map(sum, cut)) for cut in all_splits(lengths) if len(cut) <= parts)
        assert max(map(sum, filled)) == least


def test_batches_by_hand():
    """With equal row counts, the two longest rows would share a batch of 19 tokens."""
    assert lengths_of(balanced_batches([10, 2, 9, 3], 2), [10, 2, 9, 3]) == [[2, 3, 9], [10]]
    assert lengths_of(batches_within([10, 2, 9, 3], 13), [10, 2, 9, 3]) == [[2, 3], [9], [10]]


def test_equal_lengths_keep_their_order_and_no_rows_give_empty_batches():
    assert balanced_batches([4, 3, 4, 3], 1) == [[1, 3, 0, 2]]
    assert balanced_batches([], 3) == [[], [], []]
    assert batches_within([], 5) == []


def test_row_above_the_budget_gets_its_own_batch():
    assert batches_within([3, 8, 2, 9], 5) == [[2, 0], [1], [3]]
    assert batches_within([3, 8, 2, 9], 6, padded=True) == [[2, 0], [1], [3]]


@pytest.mark.parametrize("seed", range(40))
def test_padded_batches_are_the_fewest_within_the_budget(seed):
    lengths = random_lengths(seed)
    most = random.Random(-seed - 1).randint(max(lengths), 3 * max(lengths))
    batches = lengths_of(batches_within(lengths, most, padded=True), lengths)
    fits = [cut for cut in all_splits(lengths) if max(len(batch) * max(batch) for batch in cut) <= most]
    assert batches in fits
    assert len(batches) == min(map(len, fits))


def test_padded_batches_by_hand():
    """3 rows of 4 are 12 tokens; unpadded they would be 9."""
    assert lengths_of(batches_within([4, 2, 3], 11, padded=True), [4, 2, 3]) == [[2, 3], [4]]
    assert lengths_of(batches_within([4, 2, 3], 11), [4, 2, 3]) == [[2, 3, 4]]


def test_similar_length_batches_split_when_saved_padding_exceeds_batch_cost():
    lengths = [9, 3, 10, 3, 10, 2]  # sorted: 2 3 3 9 10 10; a split after the third saves 3 * (10 - 3) = 21
    assert similar_length_batches(lengths, batch_cost=20) == [[5, 1, 3], [0, 2, 4]]
    assert similar_length_batches(lengths, batch_cost=21) == [[5, 1, 3, 0, 2, 4]]
    assert similar_length_batches(lengths, batch_cost=0) == [[5], [1, 3], [0], [2, 4]]
    assert similar_length_batches([4, 4, 4], batch_cost=0) == [[0, 1, 2]]
    assert similar_length_batches([7], batch_cost=0) == [[0]]
