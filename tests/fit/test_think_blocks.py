"""A whole run behind a chat template that opens a block of reasoning, with demonstrations that have none."""

import json
import shutil
from pathlib import Path

from transformers import AutoTokenizer

from egspo_lightning import StageTransition
from egspo_lightning.data.dataset_sources import DatasetDemonstrations, DatasetProblems
from egspo_lightning.data.prompts import PromptTemplate
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.ops.objective import Objective
from egspo_lightning.rewards.functions import CorrectnessReward

REASONING = (  # as DeepSeek-R1: reasoning of earlier turns is left out
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
    "{% else %}{{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"
)


def test_sft_behind_an_opened_think_block_teaches_what_the_grader_accepts(tiny_run, small_model, tmp_path):
    model = Path(shutil.copytree(small_model, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = REASONING
    tokenizer.save_pretrained(model)
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"id": "one", "problem": "4+3=?", "solution": r"4+3=\boxed{7}", "answer": "7"}))
    run = tiny_run(
        StageTransition(after_epochs=100, learning_rate=1e-6),
        module={"policy": PolicyConfig(str(model), from_scratch=True), "objective": Objective(mu=0.0)},
        data={
            "demonstrations": DatasetDemonstrations(str(path)),
            "problems": DatasetProblems(str(path)),
            "reward": CorrectnessReward(),
            "prompt": PromptTemplate(system=""),
            "sft_batch_size": 1,
            "expert_fraction": 0.25,
            "num_minibatches": 1,
            "max_prompt_length": 16,
            "max_completion_length": 40,
        },
        trainer={"max_epochs": 101},
    ).fit()
    *sampled, expert = run.data.phases.rollouts.completions
    assert expert.text == "\n</think>\n\n4+3=\\boxed{7}"
    assert (expert.extracted, expert.reward) == ("7", 1.0)
    assert sum(completion.correct for completion in sampled) > len(sampled) / 2
    ((answer,),) = run.trainer.predict(run.module, run.data)
    assert (answer.completion, answer.correct) == (expert.text, True)
