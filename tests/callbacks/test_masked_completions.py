"""With mask_truncated, callbacks show masked completions whole, and say that the loss leaves them out."""

import warnings
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from egspo_lightning import EntropyHistogram, Guards, RolloutSamples, TokenRecords
from egspo_lightning.analysis.completion_pages import ColoredCompletions
from egspo_lightning.analysis.plot_axes import without_masked
from egspo_lightning.analysis.record_reading import load
from egspo_lightning.models.critic import CriticConfig
from egspo_lightning.ops.correction import SamplerCorrection
from egspo_lightning.ops.estimators import GAE
from egspo_lightning.ops.gate import QuantileGate
from egspo_lightning.ops.objective import Objective
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from egspo_lightning.training.adaptive_coefficients import EntropyBonus, KLReward

OBSERVERS = {"token_records": TokenRecords, "histogram": EntropyHistogram, "samples": RolloutSamples, "guards": Guards}
METHODS = {
    "egspo": {},
    "gate by sequence": {"gate": QuantileGate(0.2, over="sequence"), "entropy_bonus": EntropyBonus(0.01, target=1.0)},
    "critic": {"advantage": GAE(), "critic": CriticConfig(), "kl_reward": KLReward()},
    "kl and correction": {
        "objective": Objective(
            mask_truncated=True,
            beta=0.1,
            rescale_weights=True,
            aggregation="seq-mean-token-mean",
            sampler_correction=SamplerCorrection("truncated", "sequence"),
        )
    },
}


class Truncates(TransformersEngine):
    """Marks every ``interval``-th completion as truncated, all others as ended."""

    interval = 3

    def stream(self, lm, requests, sampling, **kwargs):
        for batch in super().stream(lm, requests, sampling, **kwargs):
            yield [(i, sample._replace(is_truncated=i % self.interval == 0)) for i, sample in batch]


class TruncatesAll(Truncates):
    """Marks every completion as truncated."""

    interval = 1


def observed(tiny_run, *, engine=None, method="egspo", epochs=1):
    module = {"initial_stage": "egspo", "objective": Objective(mask_truncated=True)} | METHODS[method]
    callbacks = [kind() for kind in OBSERVERS.values()]
    options = {"trainer": {"max_epochs": epochs}, "data": {"engine": engine or Truncates()}, "logger": True}
    return tiny_run(*callbacks, module=module, **options).fit()


def table(run, kind: str) -> list[dict]:
    return pq.read_table(Path(run.trainer.log_dir) / "token_records" / f"{kind}-000000-rank-0.parquet").to_pylist()


@pytest.mark.parametrize("method", METHODS)
def test_token_records_hold_masked_completions_with_weight_0(tiny_run, method):
    run = observed(tiny_run, method=method)
    completions, rows = run.data.phases.rollouts.completions, table(run, "tokens")
    masked = {f"0/0/{row}" for row in range(0, 16, 3)}
    assert {row["completion_id"] for row in table(run, "completions") if row["is_masked"]} == masked
    ids = [f"0/0/{number}" for number, completion in enumerate(completions) for _ in completion.token_ids]
    assert [row["completion_id"] for row in rows] == ids
    assert [row["token_id"] for row in rows] == [token for completion in completions for token in completion.token_ids]
    left_out = [row for row in rows if row["completion_id"] in masked]
    assert {(row["is_masked"], row["token_weight"], row["advantage"]) for row in left_out} == {(True, 0.0, 0.0)}
    assert not any(row["is_high_entropy"] for row in left_out)
    assert all(row["entropy"] > 0 and row["entropy_after"] > 0 and row["ratio"] > 0 for row in left_out)
    kept = [row for row in rows if row["completion_id"] not in masked]
    assert not any(row["is_masked"] for row in kept)
    assert max(row["token_weight"] for row in kept if row["is_high_entropy"]) >= 1.0


def test_samples_and_pages_mark_masked_completions(tiny_run, events):
    run = observed(tiny_run)
    log = events(run.trainer)
    (sample,) = (event.tensor_proto.string_val[0].decode() for event in log.Tensors("rollout/samples/text_summary"))
    first, second, *_ = sample.split("\n\n---\n\n")
    assert "masked: not in the loss" in first
    assert "<strong>" not in first
    assert "masked" not in second
    assert "<strong>" in second
    records = load(run.trainer.log_dir)
    page = ColoredCompletions(records, max_completions=16)._repr_html_()
    num_masked = len(range(0, 16, 3))
    assert page.count("cut at the length limit, masked: not in the loss") == num_masked
    assert page.count("none: masked, not in the loss") == records.tokens["is_masked"].sum() > num_masked
    gated = without_masked(records.tokens)
    assert gated["is_high_entropy"].mean() == pytest.approx(0.2, abs=1 / len(gated) + 1e-9)
    assert len(without_masked(records.tokens.drop(columns="is_masked"))) == len(records.tokens)  # of an earlier version


def test_histograms_hold_the_tokens_that_the_gate_ranks(tiny_run, events):
    run = observed(tiny_run)
    (histogram,) = events(run.trainer).Histograms("entropy/all")
    lengths = [len(completion.token_ids) for completion in run.data.phases.rollouts.completions]
    assert histogram.histogram_value.num == sum(n for row, n in enumerate(lengths) if row % 3)


def test_a_rollout_batch_of_masked_completions_is_no_entropy_collapse(tiny_run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = observed(tiny_run, engine=TruncatesAll(), epochs=2)
    assert not [w for w in caught if "Guard entropy_collapse" in str(w.message)]
    assert len(table(run, "tokens")) > 16
