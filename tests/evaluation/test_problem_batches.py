import pytest

from egspo_lightning.evaluation.problem_batches import problem_batches
from egspo_lightning.types import Problem, Sampling

SAMPLING = Sampling(max_completion_length=7, temperature=0.5)


def problems(count: int) -> list[Problem]:
    return [Problem(str(i), f"{i}+0=?", str(i)) for i in range(count)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 12, 13])
def test_ranks_share_all_problems_in_equally_many_batches(world_size, batch_size, count):
    ranks = [
        problem_batches("b", problems(count), 3, SAMPLING, rank=rank, world_size=world_size, batch_size=batch_size)
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    answered = [problem for batches in ranks for batch in batches for problem in batch.problems]
    assert sorted(answered) == sorted(problems(count))  # complete, and none twice
    sizes = [len(batch.problems) for batches in ranks for batch in batches]
    assert max(sizes) <= batch_size
    shares = [sum(len(batch.problems) for batch in batches) for batches in ranks]
    assert max(shares) - min(shares) <= 1
    for batches in ranks:
        assert all((batch.benchmark, batch.num_samples, batch.sampling) == ("b", 3, SAMPLING) for batch in batches)


def test_batches_by_hand():
    first, second = (
        problem_batches("b", problems(5), 1, SAMPLING, rank=rank, world_size=2, batch_size=2) for rank in range(2)
    )
    assert [[p.id for p in batch.problems] for batch in first] == [["0", "2"], ["4"]]
    assert [[p.id for p in batch.problems] for batch in second] == [["1", "3"], []]
