import pytest

from egspo_lightning.data.expert_pool import ExpertPool
from egspo_lightning.data.prompts import PromptEncoder, PromptTemplate
from egspo_lightning.errors import UserError
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.ops.batching import balanced_batches
from egspo_lightning.types import Demonstration

PLAIN = PromptTemplate(plain="{problem}")


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return PolicyConfig(tiny_model).load_tokenizer()


@pytest.fixture(scope="module")
def pool(tokenizer):
    """Seven demonstrations: prompts of 1 byte, solutions of 1 to 7 bytes and an EOS."""
    demonstrations = [Demonstration(str(i), "q", "x" * i) for i in range(1, 8)]
    return ExpertPool.encode(demonstrations, PromptEncoder(PLAIN, tokenizer, 4), max_completion_length=8, seed=3)


def lengths(drawn):
    return [len(item.completion_ids) - 1 for item in drawn]


def test_each_pass_has_each_demonstration_once_in_a_new_order(pool):
    passes = [lengths(pool.draw(7 * i, 7)) for i in range(4)]
    assert all(sorted(order) == list(range(1, 8)) for order in passes)
    assert len({tuple(order) for order in passes}) > 1


def test_draw_depends_only_on_the_position(pool):
    whole = pool.draw(0, 40)
    assert [pool.draw(i, 1)[0] for i in range(40)] == whole
    assert pool.draw(5, 20) == whole[5:25]


@pytest.fixture(scope="module")
def boxed(tokenizer):
    """Six demonstrations with boxed answers."""
    demonstrations = [Demonstration(f"d{i}", f"{i}+0=?", f"\\boxed{{{i}}}") for i in range(6)]
    return ExpertPool.encode(demonstrations, PromptEncoder(PLAIN, tokenizer, 8), max_completion_length=16, seed=3)


def test_solutions_pair_problems_and_answers_with_expert_tokens(boxed, tokenizer):
    for problem, token_ids in boxed.solutions(0, 6):
        number = problem.id.removeprefix("d")
        assert (problem.problem, problem.answer) == (f"{number}+0=?", number)
        assert token_ids == [*f"\\boxed{{{number}}}".encode(), tokenizer.eos_token_id]


def test_solutions_have_an_endless_order_different_from_draw(boxed):
    passes = [[problem.id for problem, _ in boxed.solutions(6 * i, 6)] for i in range(4)]
    assert all(sorted(order) == [f"d{i}" for i in range(6)] for order in passes)
    assert boxed.solutions(4, 9) == boxed.solutions(0, 20)[4:13]
    assert passes != [[item.demonstration.id for item in boxed.draw(6 * i, 6)] for i in range(4)]


def test_solution_without_boxed_answer_is_refused(pool):
    with pytest.raises(UserError, match=r"data\.expert_fraction: demonstration '\d' has no answer in \\boxed"):
        pool.solutions(0, 1)


def test_too_long_demonstrations_are_dropped_and_counted(tokenizer):
    demonstrations = [
        Demonstration("a", "q", "x" * 7),
        Demonstration("b", "q", "x" * 8),
        Demonstration("c", "q" * 9, "x"),
    ]
    pool = ExpertPool.encode(demonstrations, PromptEncoder(PLAIN, tokenizer, 8), max_completion_length=8, seed=0)
    assert (len(pool.demonstrations), pool.num_dropped) == (1, 2)
    assert pool.demonstrations[0].completion_ids == [*b"xxxxxxx", tokenizer.eos_token_id]
    assert "2 of 3 are dropped" in pool.warning
    assert "data.max_prompt_length = 8 or data.max_completion_length = 8" in pool.warning
    assert "longest prompt has 9 tokens, the longest solution 9" in pool.warning
    few = [Demonstration(str(n), "q", "x") for n in range(6)] + demonstrations[:2]
    pool = ExpertPool.encode(few, PromptEncoder(PLAIN, tokenizer, 8), max_completion_length=8, seed=0)
    assert (pool.num_dropped, pool.warning) == (1, None)
    with pytest.raises(UserError, match="The shortest prompt has 1 tokens, the shortest solution 2"):
        ExpertPool.encode(demonstrations, PromptEncoder(PLAIN, tokenizer, 8), max_completion_length=1, seed=0)


@pytest.mark.parametrize(("world_size", "parts"), [(1, 1), (1, 3), (2, 1), (2, 2), (3, 4)])
def test_micro_batches_of_all_ranks_cover_the_optimizer_step(pool, world_size, parts):
    update = pool.draw(0, 5)
    shares = [pool.share(update, rank, world_size) for rank in range(world_size)]
    batches = [share.batch(run) for share in shares for run in balanced_batches(share.lengths, parts)]
    assert len(batches) == world_size * parts
    tokens = [row[mask].tolist() for b in batches for row, mask in zip(b.input_ids, b.completion_mask, strict=True)]
    assert sorted(row for row in tokens if row) == sorted(item.completion_ids for item in update)
    for batch in batches:
        assert batch.update_size.num_sequences == 5
        assert batch.update_size.num_tokens == sum(len(item.completion_ids) for item in update)


def test_expert_batch_is_padded_on_the_right_after_eos(pool, tokenizer):
    batch = pool.share(pool.draw(0, 7), 0, 1).batch(range(7))
    for ids, mask in zip(batch.input_ids.tolist(), batch.completion_mask.tolist(), strict=True):
        end = max(i for i, inside in enumerate(mask) if inside)
        assert ids[end] == tokenizer.eos_token_id
        assert mask[0] is False
        assert all(mask[1 : end + 1])
        assert set(ids[end + 1 :]) <= {tokenizer.pad_token_id}
