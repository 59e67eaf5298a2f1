"""The ablation of gate, attenuation and mixing on one task: `python benchmarks/ablate.py --help`.

Three steps, each resumable by the same command: choose a learning rate for each cell on validation problems and other
seeds (`tune_learning_rates.py`), compare the cells that `ablation_cells.yaml` lists under `compared` on the held-out
problems (`egspo compare`), and write one table for each of its questions.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from egspo_lightning.analysis.comparison_table import Result, table_cells, table_page, table_rows
from egspo_lightning.analysis.markdown_table import markdown_table
from egspo_lightning.analysis.paired_bootstrap import mean_interval
from egspo_lightning.callbacks.probability_shift import SHIFTS
from egspo_lightning.cli.comparison.compared_runs import method_names
from egspo_lightning.errors import UserError, did_you_mean
from measuring.forest_plot import forest_plot
from measuring.script import command, exit_code

HERE = Path(os.path.relpath(Path(__file__).parent))  # as it stands in the commands of tables
TUNING_SEEDS = [101, 102]
RATES = [1e-4, 2e-4, 4e-4]


def main() -> int:
    arguments = _parser().parse_args()
    plan = yaml.safe_load(arguments.plan.read_text())
    questions = chosen_questions(plan, arguments.questions)
    cells = chosen_cells(questions, arguments.cells)
    output = arguments.output or Path("logs/ablation") / arguments.config.stem
    overlays = write_overlays(plan["cells"], cells, output / "cells")
    config = str(arguments.config)
    validation = str(HERE / "validation" / arguments.config.name)
    shared = ["--methods", *overlays, "--jobs", str(arguments.jobs)]
    tuning = ["--seeds", *map(str, arguments.tuning_seeds), "--rates", *(f"{rate:g}" for rate in arguments.rates)]
    tune = [str(HERE / "tune_learning_rates.py"), "--config", config, validation, *shared, *tuning]
    length = str(arguments.tuning_phases)
    _run([*tune, "--phases", length, "--evaluate_every", length, "-o", str(output / "tuning")])
    if arguments.tune_only:
        return 0
    compared = [cell for cell in cells if cell in plan["compared"]]
    methods = [overlay for cell, overlay in zip(cells, overlays, strict=True) if cell in compared]
    compare = ["-m", "egspo_lightning", "compare", "--config", config]
    compare += ["--methods", *methods, "--jobs", str(arguments.jobs)]
    compare += ["--seeds", *map(str, arguments.seeds), "--phases", str(arguments.phases)]
    rates = write_rates(output / "tuning" / "learning_rates.yaml", compared, output / "learning_rates.yaml")
    compare += ["--evaluate_every", str(arguments.phases), "--trainer.callbacks+=ProbabilityShift"]
    _run([*compare, "--learning_rates", rates, "-o", str(output / "test")])
    results = read_results(output / "test")
    write_tables(questions, compared, results, output / "tables")
    (output / "tables" / "shifts.md").write_text(shift_table(results, compared))
    return 0


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description="Ablation of gate, attenuation and mixing on one task.")
    add = result.add_argument
    add("config", type=Path, help="config of fit, such as configs/expressions.yaml; benchmarks/validation has its twin")
    add("--plan", type=Path, default=HERE / "ablation_cells.yaml", help="cells and questions")
    add("--questions", nargs="+", metavar="NAME", help="questions of the plan (all)")
    add("--cells", nargs="+", metavar="NAME", help="only these cells of the questions (all)")
    add("--seeds", type=int, nargs="+", default=list(range(1, 9)), help="seeds of the comparison (1 to 8)")
    add("--phases", type=int, default=40, help="rollout batches of a compared run (40)")
    add("--tuning_seeds", type=int, nargs="+", default=TUNING_SEEDS, help="seeds of the tuning")
    add("--tuning_phases", type=int, default=40, help="rollout batches of a tuned run (40)")
    add("--rates", type=float, nargs="+", default=RATES, help="learning rates after SFT, the same grid for each cell")
    add("--jobs", type=int, default=2, help="runs at the same time (2)")
    add("--tune_only", action="store_true", help="leave the held-out problems alone")
    add("--output", "-o", type=Path, help="folder (logs/ablation/CONFIG)")
    return result


def chosen_questions(plan: Mapping[str, Any], names: list[str] | None) -> dict[str, Any]:
    """The questions of these names, all without names; each cell that they use must be in the plan.

    Raises:
        UserError: an unknown question or cell.
    """
    known: dict[str, Any] = plan["questions"]
    for name in names or []:
        if name not in known:
            raise UserError(f"--questions: no question {name!r}. {did_you_mean(name, list(known))}.")
    chosen = {name: known[name] for name in names or known}
    for name, question in chosen.items():
        for cell in cells_of(question):
            if cell not in plan["cells"]:
                raise UserError(f"question {name}: no cell {cell!r}. {did_you_mean(cell, list(plan['cells']))}.")
    return chosen


def chosen_cells(questions: Mapping[str, Any], names: list[str] | None) -> list[str]:
    """The cells of these names, all without names, in the order of the questions.

    Raises:
        UserError: no question uses a cell.
    """
    cells = list(dict.fromkeys(cell for question in questions.values() for cell in cells_of(question)))
    for name in names or []:
        if name not in cells:
            raise UserError(f"--cells: no question has a cell {name!r}. {did_you_mean(name, cells)}.")
    return [cell for cell in cells if not names or cell in names]


def cells_of(question: Mapping[str, Any]) -> list[str]:
    """Baseline and cells of a question, in the order of its table."""
    return [question["baseline"], *question["cells"]]


def write_overlays(plan: Mapping[str, Any], cells: list[str], folder: Path) -> list[str]:
    """Write the overlay of each cell; a cell without settings is the method of that name. Returns names and paths."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for cell in cells:
        path = folder / f"{cell}.yaml"
        if not plan[cell]:
            if cell not in method_names():
                raise UserError(f"cell {cell} has no settings and is no method. {did_you_mean(cell, method_names())}.")
            found.append(cell)
            continue
        overlay = {**plan[cell], "model": {"method": cell, **plan[cell].get("model", {})}}
        path.write_text(yaml.safe_dump(overlay, sort_keys=False))
        found.append(str(path))
    return found


def read_results(folder: Path) -> list[Result]:
    """The results of a comparison."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("runs/*/seed_*.json"))]


def write_rates(tuned: Path, compared: list[str], path: Path) -> str:
    """Write the tuned learning rates of the compared cells alone, as `egspo compare` wants them. Returns the path."""
    rates = yaml.safe_load(tuned.read_text())
    path.write_text(yaml.safe_dump({cell: rates[cell] for cell in compared}, sort_keys=False))
    return str(path)


def write_tables(questions: Mapping[str, Any], compared: list[str], results: list[Result], folder: Path) -> None:
    """Write table and figure of each question with compared cells besides its baseline, and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, question in questions.items():
        cells, baseline = [cell for cell in cells_of(question) if cell in compared], question["baseline"]
        if baseline not in cells or len(cells) < 2:
            continue
        rows = table_rows(results, cells, baseline)
        used = [result for result in results if result["label"] in cells]
        (folder / f"{name}.md").write_text(table_page(used, rows, baseline, command()))
        forest_plot(rows, baseline, question["title"]).savefig(folder / f"{name}.png", dpi=120)
        header, lines = table_cells(rows, baseline)
        print(f"\n{name}\n" + "\n".join(" | ".join(line[:7]) for line in [header, *lines]))


def shift_table(results: list[Result], cells: list[str]) -> str:
    """How much the steps on a rollout batch moved log-probabilities: ``SHIFTS``, 1e-3 nats, mean over seeds."""
    rows = []
    for cell in cells:
        means = [result["means"] for result in results if result["label"] == cell]
        found = [[mean[name] for mean in means if mean.get(name) is not None] for name in SHIFTS]
        rows.append([cell, str(len(means)), *("–" if not values else _interval(values) for values in found)])
    header = ["cell", "seeds", *(name.removeprefix("shift/").replace("_", " ") for name in SHIFTS)]
    about = "Mean change of log-probability by the optimizer steps on a rollout batch, 1e-3 nats per token, with 95 % "
    return f"{markdown_table(header, rows)}\n\n{about}bootstrap intervals over seeds.\n\nCommand: `{command()}`\n"


def _interval(values: list[float]) -> str:
    estimate = mean_interval(1e3 * np.array(values)[:, None])
    return f"{estimate.mean:+.2f} ({estimate.low:+.2f} to {estimate.high:+.2f})"


def _run(arguments: list[str]) -> None:
    """Run a Python command, with its progress on this terminal.

    Raises:
        UserError: it failed; its own message stands above.
    """
    code = subprocess.run([sys.executable, *arguments]).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise UserError(f"python {' '.join(arguments[:3])} ended with exit code {code}; its message stands above.")


if __name__ == "__main__":
    sys.exit(exit_code(main))
