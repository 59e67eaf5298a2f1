"""The plan of the ablation: every cell is a method or a valid overlay, and questions name known cells."""

import pytest
import yaml

from ablate import cells_of, chosen_cells, chosen_questions, write_overlays
from egspo_lightning.cli.comparison.compared_runs import method_file
from egspo_lightning.errors import UserError


@pytest.fixture(scope="module")
def plan(repository):
    return yaml.safe_load((repository / "benchmarks" / "ablation_cells.yaml").read_text())


@pytest.mark.slow
def test_every_cell_parses_and_serves_a_question(parser, plan, repository, tmp_path, monkeypatch):
    monkeypatch.chdir(repository)
    used = {cell for question in plan["questions"].values() for cell in cells_of(question)}
    assert used == set(plan["cells"])
    assert used >= set(plan["compared"]) >= {question["baseline"] for question in plan["questions"].values()}
    overlays = write_overlays(plan["cells"], list(plan["cells"]), tmp_path)
    for cell, overlay in zip(plan["cells"], overlays, strict=True):
        model = parser.parse_args(
            ["fit", "--config=configs/quickstart.yaml", f"--config={method_file(overlay)}"]
        ).fit.model
        assert model.method == cell


def test_unknown_questions_and_cells_are_refused_with_a_suggestion(plan, tmp_path):
    with pytest.raises(UserError, match=r"no question 'defalt'\. Did you mean default"):
        chosen_questions(plan, ["defalt"])
    broken = {"cells": plan["cells"], "questions": {"q": {"baseline": "egspo", "cells": ["top_6"]}}}
    with pytest.raises(UserError, match=r"question q: no cell 'top_6'\. Did you mean top_5"):
        chosen_questions(broken, None)
    with pytest.raises(UserError, match=r"--cells: no question has a cell 'sff'\. Did you mean sft"):
        chosen_cells(plan["questions"], ["egspo", "sff"])
    with pytest.raises(UserError, match=r"cell grpp has no settings and is no method\. Did you mean grpo"):
        write_overlays({"grpp": {}}, ["grpp"], tmp_path)


def test_chosen_cells_keep_the_order_of_the_questions(plan):
    default = {"default": plan["questions"]["default"]}
    assert chosen_cells(default, None) == ["chord_phi", "sft", "grpo", "egspo"]
    assert chosen_cells(default, ["egspo", "chord_phi"]) == ["chord_phi", "egspo"]
