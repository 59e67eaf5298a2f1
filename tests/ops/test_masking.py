import pytest
import torch

from egspo_lightning.ops.masking import aggregate, masked_mean, masked_sum, masked_whiten

VALUES = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]
MASK = [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
MASK_INDEX = torch.tensor(MASK).bool()
MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


def test_masked_sums_and_means_by_hand():
    assert masked_sum(VALUES, MASK).item() == 7.0
    assert masked_sum(VALUES, MASK, -1).tolist() == [3.0, 4.0, 0.0]
    assert masked_mean(VALUES, MASK).item() == pytest.approx(7 / 3, abs=1e-12)
    assert masked_mean(VALUES, MASK, -1).tolist() == [1.5, 4.0, 0.0]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_masked_functions_ignore_non_finite_masked_values(poison):
    values = torch.tensor(VALUES)
    values[~torch.tensor(MASK).bool()] = poison
    assert masked_sum(values, MASK).item() == 7.0
    assert masked_whiten(values, MASK)[0, 2].item() == 0.0
    assert aggregate(values, MASK, "token-mean").item() == pytest.approx(7 / 3)


def test_whitening_by_hand():
    # 1, 2, 4: mean 7/3, unbiased variance 7/3
    whitened = masked_whiten(VALUES, MASK)
    deviation = (7 / 3 + 1e-8) ** 0.5
    expected = [(1 - 7 / 3) / deviation, (2 - 7 / 3) / deviation, (4 - 7 / 3) / deviation]
    assert whitened[MASK_INDEX].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", 7 / 3),
        ("seq-mean-token-mean", (1.5 + 4) / 2),
        ("seq-mean-token-sum", (3 + 4) / 2),
        ("seq-mean-token-sum-norm", (3 + 4) / 2 / 3),
    ],
)
def test_aggregation_by_hand(mode, expected):
    assert aggregate(VALUES, MASK, mode).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_empty_mask_gives_zero(mode):
    values = torch.ones(2, 3, requires_grad=True)
    loss = aggregate(values, torch.zeros(2, 3), mode)
    loss.backward()
    assert loss.item() == 0.0
    assert values.grad.tolist() == [[0.0] * 3] * 2
    assert masked_mean(values, torch.zeros(2, 3)).item() == 0.0
    assert masked_whiten(values.detach(), torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("splits", [[8], [2, 6], [1] * 8])
def test_parts_with_shared_normalizer_add_up_to_the_whole(mode, splits):
    torch.manual_seed(0)
    values, mask = torch.randn(8, 5, dtype=torch.float64), torch.rand(8, 5) < 0.6
    mask[3] = False
    sequences = mask.any(-1).sum().item()
    normalizer = {"token-mean": mask.sum().item(), "seq-mean-token-sum-norm": sequences * 5}.get(mode, sequences)
    parts = [
        aggregate(v, m, mode, normalizer=normalizer)
        for v, m in zip(values.split(splits), mask.split(splits), strict=True)
    ]
    assert sum(parts).item() == pytest.approx(aggregate(values, mask, mode).item(), abs=1e-12)


def test_aggregate_matches_slow_loop():
    torch.manual_seed(1)
    for _ in range(20):
        rows, width = (int(n) for n in torch.randint(1, 7, (2,)))
        values, mask = torch.randn(rows, width, dtype=torch.float64), torch.rand(rows, width) < 0.7
        kept = [
            [v for v, m in zip(vs, ms, strict=True) if m] for vs, ms in zip(values.tolist(), mask.tolist(), strict=True)
        ]
        kept = [row for row in kept if row]
        tokens, sequences = sum(map(len, kept)), len(kept)
        expected = {
            "token-mean": sum(map(sum, kept)) / max(tokens, 1),
            "seq-mean-token-mean": sum(sum(row) / len(row) for row in kept) / max(sequences, 1),
            "seq-mean-token-sum": sum(map(sum, kept)) / max(sequences, 1),
            "seq-mean-token-sum-norm": sum(map(sum, kept)) / max(sequences * width, 1),
        }
        for mode, value in expected.items():
            assert aggregate(values, mask, mode).item() == pytest.approx(value, abs=1e-12)


def test_unknown_mode_error_lists_known_modes():
    with pytest.raises(ValueError, match="token-mean, seq-mean-token-mean"):
        aggregate(VALUES, MASK, "mean")


def test_whitening_over_ranks_equals_whitening_of_the_whole(on_ranks):
    torch.manual_seed(2)
    values, mask = 3 + torch.randn(9, 5, dtype=torch.float64), torch.rand(9, 5) < 0.6
    mask[7:] = False  # a rank without tokens
    parts = list(zip(values.split([4, 3, 2]), mask.split([4, 3, 2]), strict=True))
    shared = on_ranks(lambda rank, part: masked_whiten(*part, total=rank.sum_over_ranks), parts)
    assert torch.allclose(torch.cat(shared), masked_whiten(values, mask), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(masked_whiten(*parts[0]), shared[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sizes", [[1000], [300, 700], [999, 1]])
def test_equal_values_are_whitened_to_exactly_zero(on_ranks, sizes):
    # a rounding error in the mean, divided by sqrt(1e-8), would be noise of 1e-3
    for value in (0.1, 0.7, 1.1, -7.7):
        parts = [torch.full((size, 1), value) for size in sizes]
        whitened = on_ranks(lambda rank, x: masked_whiten(x, x != 0, total=rank.sum_over_ranks), parts)
        assert not torch.cat(whitened).any()


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_values_for_a_variance_are_whitened_to_zero(count):
    mask = torch.arange(3) < count
    assert masked_whiten([5.0, 6.0, 7.0], mask).tolist() == [0.0, 0.0, 0.0]
