"""Docs: commands in the guides run, links resolve, the reference lists every module. `.ci/run` builds the site."""

import importlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from egspo_lightning.cli.example_data import write_example_data
from egspo_lightning.cli.main import main
from egspo_lightning.cli.report_command import write_report
from reference_pages import on_page_markdown

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted((REPOSITORY / "docs").rglob("*.md"))
WRITTEN = [*PAGES, *sorted(REPOSITORY.glob("*.md")), REPOSITORY / "benchmarks" / "README.md"]
GUIDES = sorted((REPOSITORY / "docs" / "guides").glob("*.md"))
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"\]\(([^()\s]+)\)|<(https?://[^>\s]+)>")


def relative_path(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


# Links


def prose(path: Path) -> str:
    """Text of a page without code, where brackets are not links."""
    return CODE.sub("", FENCED.sub("", path.read_text(encoding="utf-8")))


def anchors(path: Path) -> set[str]:
    """Anchors that GitHub and MkDocs generate from headings."""
    titles = re.findall(r"^#+ (.+)$", FENCED.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def link_error(page: Path, link: str) -> str | None:
    """Error of a link, or None. External addresses are checked for syntax only."""
    parts = urlsplit(link)
    if parts.scheme:
        is_address = parts.scheme in ("http", "https") and re.fullmatch(r"[\w.-]+(:\d+)?", parts.netloc)
        return None if is_address else "is no address"
    target = (page.parent / parts.path).resolve() if parts.path else page
    if not target.exists():
        return "leads to no file"
    if not parts.fragment:
        return None
    if "reference" in target.parts:
        return None if is_documented(parts.fragment) else "names nothing in the package"
    return None if parts.fragment in anchors(target) else "leads to no heading"


def is_documented(name: str) -> bool:
    """Whether ``name`` is a module or an attribute of one."""
    module, _, attribute = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ImportError:
        return hasattr(importlib.import_module(module), attribute)
    return True


@pytest.mark.parametrize("page", WRITTEN, ids=relative_path)
def test_all_links_resolve(page):
    links = [a or b for a, b in LINK.findall(prose(page))]
    assert {link: found for link in links if (found := link_error(page, link)) is not None} == {}


def test_link_error_detects_broken_links():
    page = REPOSITORY / "README.md"
    assert link_error(page, "docs/no_such.md") == "leads to no file"
    assert link_error(page, "CONTRIBUTING.md#no-such") == "leads to no heading"
    assert link_error(page, "#the-method") is None
    assert link_error(page, "docs/reference/ops.md#egspo_lightning.ops.gate.NoGate") == "names nothing in the package"
    assert link_error(page, "htp://arxiv.org/abs/1") == link_error(page, "https:///abs") == "is no address"
    assert sum(len(LINK.findall(prose(path))) for path in WRITTEN) > 30


# Reference


def test_reference_lists_every_public_module():
    pages = (REPOSITORY / "docs" / "reference").glob("*.md")
    shown = {name for page in pages for name in re.findall(r"^::: (\S+)$", on_page_markdown(page.read_text()), re.M)}
    package = REPOSITORY / "egspo_lightning"
    modules = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in package.rglob("*.py")}
    assert shown == {name for name in modules if not any(part.startswith("_") for part in name.split("."))}


def test_mkdocs_menu_lists_every_page():
    class Loader(yaml.SafeLoader):
        """Allows the custom tags of mkdocs.yml."""

    menu = yaml.load((REPOSITORY / "mkdocs.yml").read_text(), Loader)["nav"]
    listed = re.findall(r"[\w/]+\.md", json.dumps(menu))
    assert sorted(listed) == sorted(str(page.relative_to(REPOSITORY / "docs")) for page in PAGES)


def test_ci_builds_the_docs_site():
    ci = (REPOSITORY / ".ci" / "run").read_text()
    assert 'pip install -q -e ".[docs]" -c constraints.txt' in ci
    assert "mkdocs build --strict" in ci


# Commands

TESTED_ELSEWHERE = {
    'pip install -e ".[notebooks]" -c constraints.txt',  # .ci/run installs
    "tensorboard --logdir logs",  # tests/callbacks/test_dashboard.py starts it
    "python -m egspo_lightning fit --config configs/quickstart.yaml --trainer.strategy ddp --trainer.devices 2",
    "python -m egspo_lightning compare --config configs/quickstart.yaml --methods egspo chord_phi grpo --seeds 1 2 3 "
    "-o logs/methods",
}
"""Commands that other tests run. The last two need several processes: see tests/fit/test_ranks.py and
tests/cli/test_compare.py."""
OPTIONAL = {"MLFlowLogger": "mlflow", "WandbLogger": "wandb"}
SHORT = [
    "--trainer.max_epochs=2",
    "--trainer.enable_progress_bar=false",
    "--stage_transition.after_epochs=1",
    "--data.num_problems=2",
    "--data.num_generations=2",
    "--data.max_completion_length=40",
    "--data.eval_batch_size=8",
    "--data.benchmarks.init_args.limit=4",
]
LOCAL = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.strategy=auto",
    "--trainer.precision=32-true",
    "--model.policy.from_scratch=true",
    "--data.demonstrations.init_args.path=rows",
    "--data.problems.init_args.path=rows",
    '--data.benchmarks=[{"class_path": "egspo_lightning.evaluation.benchmarks.DatasetBenchmark", '
    '"init_args": {"name": "local", "path": "held.jsonl"}}]',
]
"""Arguments that make a Hub and GPU recipe run with local files on a CPU."""


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.strip().splitlines()]


ALL = sorted({(relative_path(page), command) for page in PAGES for command in commands(page)} - {("", "")})
RUN = [pair for pair in ALL if pair[1] not in TESTED_ELSEWHERE]


@pytest.fixture
def folder(tmp_path, monkeypatch, small_model) -> Iterator[Path]:
    """Working folder of a reader: the configs with an even smaller model, and the files of all guides."""
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    shutil.copytree(small_model, tmp_path / "configs" / "tiny_model", dirs_exist_ok=True)
    for page in GUIDES:
        for name, text in re.findall(
            r'^```\w+ title="([^"]+)"\n(.*?)^```$', page.read_text(), re.DOTALL | re.MULTILINE
        ):
            assert not (tmp_path / name).exists(), f"{name} is in two guides"
            (tmp_path / name).write_text(text)
    (tmp_path / "rows").mkdir()
    rows = [{"problem": f"{i}+1=?", "solution": f"\\boxed{{{i + 1}}}", "answer": str(i + 1)} for i in range(10, 26)]
    (tmp_path / "rows" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "held.jsonl").write_text(json.dumps({"problem": "7+1=?", "answer": "8"}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def fit(arguments: list[str], folder: Path) -> None:
    hub = "qwen" in " ".join(arguments)
    own = ["--model.policy.name_or_path=configs/tiny_model", *LOCAL] if hub else []
    main([*arguments, *SHORT[: -1 if hub else None], *own])


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), RUN, ids=[f"{page}-{i}" for i, (page, _) in enumerate(RUN)])
def test_commands_in_the_guides_run(folder, capsys, page, command):
    arguments = shlex.split(command)[3:]
    if arguments[0] == "example_data":
        assert "train.jsonl" in write_example_data(arguments[1:])
        return
    if "configs/own_data.yaml" in arguments:  # reads the files of the command before
        write_example_data([])
    for name, library in OPTIONAL.items():
        if name in arguments:
            pytest.importorskip(library, reason=f"needs {library}: pip install {library}")
    if "logs/lightning_logs/version_0" in command:  # the log folder of an earlier command
        quickstart = ["fit", "--config=configs/quickstart.yaml"]
        fit([*quickstart, "--trainer.max_epochs=2"], folder)
    if arguments[0] == "report":
        assert write_report(arguments[1:], "") == "Report: report.html"
        return
    if arguments[0] == "plan":
        main([*arguments, "--model.policy.name_or_path=configs/tiny_model", "--model.policy.from_scratch=true"])
        assert "fits" in capsys.readouterr().out
        return
    fit(arguments, folder)
    if arguments[0] in ("test", "predict"):
        assert ("avg@1" if arguments[0] == "test" else "Answers:") in capsys.readouterr().out
        return
    assert re.search(r"after (?!SFT)[A-Z_]+", capsys.readouterr().out) or "--math_benchmark.enabled" in arguments


def test_commands_tested_elsewhere_are_in_the_guides():
    assert {command for _, command in ALL} >= TESTED_ELSEWHERE
    assert len(RUN) > 15
