"""Rows of different lengths as micro-batches: so few that each is within a bound, or so many of like size.

Rows are taken shortest first and cut into runs, so that rows of like length stand together and little is padded.
"""

from collections.abc import Sequence


def cut_within(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Rows in the fewest runs of at most ``most`` tokens each.

    Each run takes what fits, which is least: whoever ends one earlier has more left for those behind it.

    Args:
        lengths: tokens of each row, none more than ``most``
        most: tokens of a run
    """
    runs: list[list[int]] = []
    room = 0
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if lengths[row] > room:
            runs.append([])
            room = most
        runs[-1].append(row)
        room -= lengths[row]
    assert room >= 0, "a row is longer than a run may be"
    return runs


def cut_evenly(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Rows in ``parts`` runs of which the largest has as few tokens as can be; some are empty where rows are few.

    Args:
        lengths: tokens of each row
        parts: number of runs, at least 1
    """
    least, most = max(lengths, default=0), sum(lengths)
    while least < most:  # the least bound that so many runs can keep
        middle = (least + most) // 2
        if len(cut_within(lengths, middle)) <= parts:
            most = middle
        else:
            least = middle + 1
    runs = cut_within(lengths, most)
    return runs + [[] for _ in range(parts - len(runs))]
