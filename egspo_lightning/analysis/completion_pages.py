"""Colored completions: HTML pages, without scripts, that color each token by its entropy.

Text of models and data sets may be hostile. ``token_text.visible`` replaces control characters, then the text is
escaped, and the page's content security policy forbids scripts and external content.
"""

from collections.abc import Iterator
from html import escape
from typing import Any

from egspo_lightning.analysis.record_reading import Records
from egspo_lightning.analysis.token_text import visible
from egspo_lightning.errors import UserError, require

STYLE = """
.egspo{color:#1c1c1c;background:#fff;font:14px/1.5 system-ui,sans-serif;padding:.2em .6em;max-width:60em}
.egspo h1{font-size:1.4em;margin:.6em 0 .2em}
.egspo h2{font-size:1.1em;margin:1.6em 0 .4em;padding-bottom:.2em;border-bottom:1px solid #ccc}
.egspo nav a{margin-right:.6em}
.egspo .key{display:flex;gap:1.4em;align-items:center;flex-wrap:wrap;margin:.5em 0;color:#444}
.egspo .bar{display:inline-block;width:9em;height:1em;margin:0 .4em;vertical-align:-.15em;border:1px solid #ccc;
 background:linear-gradient(90deg,rgb(230 120 0/0),rgb(230 120 0/.85))}
.egspo article{margin:.8em 0;padding:.6em .8em;border:1px solid #ddd;border-left:.35em solid #cc79a7;border-radius:4px}
.egspo article.right{border-left-color:#009e73}
.egspo dl{display:flex;flex-wrap:wrap;gap:0 1.6em;margin:0 0 .3em;color:#444}
.egspo dl div{display:flex;gap:.5em}
.egspo dt{color:#6b6b6b}
.egspo dd{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate}
.egspo .text{font:15px/2 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate}
.egspo .t{position:relative;background:rgb(230 120 0/var(--h));border-bottom:2px solid transparent}
.egspo .high{border-bottom-color:#1c1c1c}
.egspo .t:hover{outline:2px solid #0072b2}
.egspo .t:hover::after{content:attr(data-v);position:absolute;left:0;top:1.9em;z-index:9;white-space:pre;direction:ltr;
 unicode-bidi:isolate;background:#1c1c1c;color:#fff;font:12px/1.45 ui-monospace,monospace;padding:.5em .7em;
 border-radius:4px;pointer-events:none}
"""
DARKEST = 0.85
"""Background opacity of the highest entropy; dark text on it keeps a contrast above 5 to 1."""

POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_SHOWN = {
    "entropy": ("entropy", "nats"),
    "threshold": ("threshold", "nats"),
    "old_logprob": ("log-probability", "nats"),
    "phi": ("phi", ""),
    "token_weight": ("weight", ""),
    "advantage": ("advantage", ""),
    "ratio": ("ratio after update", ""),
    "entropy_after": ("entropy after update", "nats"),
    "reward": ("reward", ""),
}
"""Column to name and unit, for the box that opens over a token."""


class ColoredCompletions:
    """Completions as HTML: a notebook shows the object itself, ``page`` makes a page.

    The background shows the entropy, from transparent at 0 to full color at ``most`` nats. High-entropy tokens, which
    take the full update, are underlined. Hovering over a token opens its recorded values.

    Args:
        records: records of one or several runs
        rollout_batch: number of the only rollout batch to show; by default all
        max_completions: limit of the completions shown; the latest rollout batches come first
        most: entropy of the full color, nats; by default the 99 % quantile of the tokens shown

    Raises:
        UserError: there is nothing to show
    """

    def __init__(
        self, records: Records, *, rollout_batch: int | None = None, max_completions: int = 8, most: float | None = None
    ) -> None:
        require(max_completions >= 1, "max_completions", max_completions, "at least 1")
        completions = records.completions
        if rollout_batch is not None:
            known = sorted(completions["rollout_batch"].unique().tolist())
            allowed = f"one of those recorded: {', '.join(map(str, known))}"
            require(rollout_batch in known, "rollout_batch", rollout_batch, allowed)
            completions = completions[completions["rollout_batch"] == rollout_batch]
        if completions.empty:
            raise UserError("There are no completions to show. Did a filter remove all of them?")
        latest_first = completions.sort_values("rollout_batch", ascending=False, kind="stable")
        self.completions = latest_first.head(max_completions)
        keys = ["run", "completion_id"]
        self.tokens = records.tokens.merge(self.completions[keys], on=keys)
        self.most = most or max(float(self.tokens["entropy"].quantile(0.99)), 1e-3)

    def _repr_html_(self) -> str:
        """HTML for notebooks."""
        return f"<style>{STYLE}</style><div class='egspo'>{self._key()}{''.join(self._sections())}</div>"

    def page(self, title: str) -> str:
        """Make a complete HTML page."""
        numbers = self.completions["rollout_batch"].unique().tolist()
        links = "".join(f'<a href="#c{number}">{number}</a>' for number in numbers)
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_safe(title)}</title>'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
            f'<body><main class="egspo"><h1>{_safe(title)}</h1>{self._key()}<nav>Rollout batches: {links}</nav>'
            f"{''.join(self._sections())}</main></body></html>"
        )

    def _key(self) -> str:
        return (
            f'<div class="key"><span>entropy 0<span class="bar"></span>{self.most:.2f} nats and more</span>'
            '<span><span class="t high" style="--h:0">underlined</span>: high entropy, full update</span>'
            f"<span>{len(self.completions)} completions, {len(self.tokens):,} tokens; hover over one</span></div>"
        )

    def _sections(self) -> Iterator[str]:
        """The completions of each rollout batch, under its heading."""
        several = self.completions["run"].nunique() > 1
        tokens = dict(list(self.tokens.groupby(["run", "completion_id"], sort=False)))
        for (number, run), part in self.completions.groupby(["rollout_batch", "run"], sort=False):
            yield f'<h2 id="c{number}">Rollout batch {number}{_safe(f" of {run}") if several else ""}</h2>'
            for completion in part.to_dict("records"):
                rows = tokens.get((run, completion["completion_id"]))
                yield self._article(completion, [] if rows is None else rows.to_dict("records"))

    def _article(self, completion: dict[str, Any], tokens: list[dict[str, Any]]) -> str:
        verdict = "right" if completion["is_correct"] else "wrong"
        cut = ", cut at the length limit" if completion["is_truncated"] else ""
        extracted = completion["extracted"]
        facts = {
            "problem": completion["problem"],
            "answer": extracted if isinstance(extracted, str) else "none found",  # pandas has NaN for null
            "gold answer": completion["gold"],
            "verdict": f"{verdict}, reward {completion['reward']:g}, {completion['length']} tokens{cut}",
        }
        head = "".join(f'<div><dt>{key}</dt><dd dir="auto">{_safe(text)}</dd></div>' for key, text in facts.items())
        text = "".join(self._token(token) for token in tokens)
        return f'<article class="{verdict}"><dl>{head}</dl><div class="text" dir="auto">{text}</div></article>'

    def _token(self, token: dict[str, Any]) -> str:
        opacity = DARKEST * min(max(token["entropy"] / self.most, 0.0), 1.0)
        kind = "t high" if token["is_high_entropy"] else "t"
        text, values = _safe(token["token"]) or "\u2205", escape(_values(token), quote=True)
        return f'<span class="{kind}" style="--h:{opacity:.2f}" data-v="{values}">{text}</span>'


def _values(token: dict[str, Any]) -> str:
    """Recorded values of a token, one a line, with control characters replaced but not escaped."""
    gate = "high: full update" if token["is_high_entropy"] else "low: attenuated"
    lines = [
        f"token \u201c{visible(token['token'], spaces=True)}\u201d, id {token['token_id']}",
        f"position             {token['position']}",
        f"gate                 {gate}",
        *(f"{name:20} {token[column]:.4g} {unit}".rstrip() for column, (name, unit) in _SHOWN.items()),
        f"problem {visible(token['problem_id'])}, completion {token['completion_id']}",
    ]
    return "\n".join(lines)


def _safe(text: str) -> str:
    """Escape text, also for quoted attributes; a line end becomes a printable sign and a line end."""
    return escape(visible(text).replace("\u240a", "\u240a\n"), quote=True)
