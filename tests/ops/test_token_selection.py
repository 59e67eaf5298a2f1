"""Selection of a fixed share of tokens: exact with equal scores, and the same tokens on any number of ranks."""

import pytest
import torch

from egspo_lightning.ops.control_gates import InverseGate, PositionGate, RandomGate
from egspo_lightning.ops.gate import QuantileGate, quantile_threshold
from egspo_lightning.ops.token_selection import mix, num_above_quantile, token_hash
from egspo_lightning.ops.token_view import Statistics, TokenView

GATES = [QuantileGate(0.2), RandomGate(0.2), InverseGate(0.2), PositionGate(0.2), PositionGate(0.2, end="last")]


def view(entropies, mask=None, groups=None, over_ranks=None, number=0):
    """A view in which each row is a group of its own, unless told."""
    mask = torch.ones_like(entropies, dtype=torch.bool) if mask is None else mask
    rows = torch.arange(len(entropies))
    fields = dict.fromkeys(TokenView._fields) | {"entropies": entropies, "current_entropies": entropies, "mask": mask}
    fields |= {"groups": rows if groups is None else groups, "members": torch.zeros_like(rows)}
    return TokenView(**fields | {"number": number, "over_ranks": over_ranks or Statistics()})


def num_selected(count, fraction):
    return num_above_quantile(fraction, torch.ones(count, dtype=torch.bool), Statistics())


def selected(gate, tokens):
    return gate.is_high(tokens, torch.zeros(())) & tokens.mask


def test_mix_is_the_splitmix64_generator():
    # the first outputs of splitmix64 for seed 0 (Vigna's reference implementation); its state steps by the golden gamma
    gamma = 0x9E3779B97F4A7C15 - (1 << 64)
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    outputs = [mix(torch.tensor(gamma) * step).item() % (1 << 64) for step in (1, 2, 3)]
    assert outputs == expected


@pytest.mark.parametrize("fraction", [0.05, 0.2, 1 / 3, 0.5, 1.0])
def test_number_selected_is_that_of_a_quantile_of_distinct_values(fraction):
    for count in (*range(1, 40), 1000):
        values = torch.arange(count, dtype=torch.float64)
        threshold = quantile_threshold(values, torch.ones(count), fraction)
        assert num_selected(count, fraction) == (values >= threshold).sum()
        assert abs(num_selected(count, fraction) - fraction * count) < 1
    assert num_selected(0, fraction) == 0


def test_keys_of_distinct_tokens_are_distinct():
    tokens = view(torch.zeros(50, 40))
    assert token_hash(tokens).unique().numel() == 2000
    assert not torch.equal(token_hash(tokens), token_hash(tokens, seed=1))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.95, 1.0])
def test_exactly_the_share_is_high_whatever_the_ties(gate, zeros):
    generator = torch.Generator().manual_seed(0)
    entropies = torch.rand(20, 30, generator=generator) * (torch.rand(20, 30, generator=generator) >= zeros)
    mask = torch.arange(30) < torch.randint(1, 31, (20, 1), generator=generator)
    high = selected(gate, view(entropies, mask))
    assert high.sum() == num_selected(int(mask.sum()), 0.2)
    assert not high[~mask].any()


@pytest.mark.parametrize("gate", GATES)
def test_two_ranks_select_the_tokens_of_one(gate, on_ranks):
    generator = torch.Generator().manual_seed(1)
    entropies = torch.rand(10, 12, generator=generator) * (torch.rand(10, 12, generator=generator) >= 0.9)
    mask = torch.arange(12) < torch.randint(0, 13, (10, 1), generator=generator)
    whole = selected(gate, view(entropies, mask))

    def work(rank, rows):
        ranks = Statistics(rank.sum_over_ranks, rank.gather_over_ranks)
        return selected(gate, view(entropies[rows], mask[rows], rows, ranks))

    parts = [torch.tensor([7, 1, 3]), torch.tensor([0, 2, 4, 5, 6, 8, 9])]
    for rows, high in zip(parts, on_ranks(work, parts), strict=True):
        assert torch.equal(high, whole[rows])


def test_without_ties_the_quantile_gate_selects_by_the_threshold():
    entropies = torch.rand(8, 25, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for over in ("batch", "sequence"):
        high = QuantileGate(0.3, over=over).is_high(view(entropies), torch.zeros(()))
        quantiles = entropies.quantile(0.7, dim=1, keepdim=True) if over == "sequence" else entropies.quantile(0.7)
        assert torch.equal(high, entropies >= quantiles)


def test_ties_are_spread_over_the_rollout_batch():
    high = selected(QuantileGate(0.2), view(torch.zeros(40, 50)))
    assert high.sum() == num_selected(2000, 0.2)
    assert high.any(1).all()  # every completion has some: 50 tokens, of which 10 are expected
    assert high.sum(0).float().std() < 2 * (40 * 0.2 * 0.8) ** 0.5  # no position is preferred


def test_random_gate_draws_anew_for_each_rollout_batch_and_seed():
    tokens = view(torch.rand(20, 30, generator=torch.Generator().manual_seed(3)))
    first, again = selected(RandomGate(), tokens), selected(RandomGate(), tokens)
    assert torch.equal(first, again)
    for other in (selected(RandomGate(seed=1), tokens), selected(RandomGate(), tokens._replace(number=4))):
        overlap = (first & other).sum() / first.sum()
        assert 0.05 < overlap < 0.4  # independent draws share a fifth


@pytest.mark.parametrize("seed", [0, 2**31, 2**63, 2**80])
def test_random_gate_takes_any_seed(seed):
    tokens = view(torch.zeros(10, 10))
    assert selected(RandomGate(seed=seed), tokens).sum() == num_selected(100, 0.2)


def test_control_gates_by_hand():
    entropies = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.0, 0.0]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    tokens = view(entropies, mask)  # six tokens; half of them are 6 - ceil(0.5 * 5) = 3
    assert selected(InverseGate(0.5), tokens).tolist() == [[True, True, True, False], [False] * 4]
    # relative positions 1/8, 3/8, 5/8, 7/8 and 1/4, 3/4
    assert selected(PositionGate(0.5), tokens).tolist() == [[True, True, False, False], [True, False, False, False]]
    last = [[False, False, True, True], [False, True, False, False]]
    assert selected(PositionGate(0.5, end="last"), tokens).tolist() == last


def test_no_token_on_any_rank_selects_none():
    nothing = view(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    assert not selected(QuantileGate(0.5), nothing).any()
