"""The report: one self-contained HTML page that tells one or several runs.

Text of models and data sets may be hostile. Python escapes what it writes, the scripts set ``textContent`` only, and
the page's content security policy allows its own scripts by hash and no external content. Plotly and the data are
embedded compressed; the browser unpacks them.
"""

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment

from egspo_lightning.analysis.report_charts import charts
from egspo_lightning.analysis.report_completions import completions_data
from egspo_lightning.analysis.report_tables import differing_settings, facts, scores
from egspo_lightning.analysis.run_reading import Run
from egspo_lightning.analysis.token_fields import FIELDS, gate_of
from egspo_lightning.analysis.token_text import shown
from egspo_lightning.errors import require

ASSETS = files("egspo_lightning.analysis") / "report_assets"
SCRIPTS = ("unpack.js", "charts.js", "completions.js")


def report_page(runs: Sequence[Run], max_completions: int) -> str:
    """Make the page.

    Args:
        runs: at least one run
        max_completions: limit of the completions in the page; beyond it they are spread evenly over training

    Raises:
        UserError: max_completions is below 1.
    """
    require(max_completions >= 1, "max_completions", max_completions, "at least 1")
    completions = completions_data(runs, max_completions)
    plotly, script = _plotly(), "\n".join(_asset(name) for name in SCRIPTS)
    data = {
        "runs": [shown(run.name) for run in runs],
        "charts": charts(runs),
        "completions": completions,
        "fields": [field._asdict() for field in FIELDS],
        "gates": {"low": gate_of(False, False), "high": gate_of(True, False), "masked": gate_of(False, True)},
    }
    environment = Environment(autoescape=True)
    environment.filters["text"] = shown
    return environment.from_string(_asset("page.jinja")).render(
        title=", ".join(run.name for run in runs),
        style=_asset("report.css"),
        policy=_policy(script, plotly),
        runs=facts(runs),
        tables=[table for table in (scores(runs), differing_settings(runs)) if table is not None],
        num_shown=0 if completions is None else len(completions["completions"]["run"]),
        num_recorded=0 if completions is None else completions["recorded"],
        script=script,
        plotly=_packed(plotly),
        data=_packed(json.dumps(data, separators=(",", ":"), allow_nan=False)),
    )


def _plotly() -> str:
    """The JavaScript library, from the Python package."""
    return (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode("utf-8"), mtime=0)).decode("ascii")


def _policy(*scripts: str) -> str:
    """A content security policy: these scripts, styles of the page, and pictures that the page itself draws."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii") for script in scripts)
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
