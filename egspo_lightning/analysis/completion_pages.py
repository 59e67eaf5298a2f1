"""Colored completions for notebooks: HTML, without scripts, that colors each token by its entropy.

Text of models and data sets may be hostile. ``token_text.shown`` replaces control characters, and jinja2 escapes the
text. ``report_page`` makes the page of a whole run.
"""

from typing import Any

from jinja2 import Environment

from egspo_lightning.analysis.record_reading import Records
from egspo_lightning.analysis.token_fields import FIELDS, gate_of
from egspo_lightning.analysis.token_text import shown, visible
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
TEMPLATE = """
<style>{{ style | safe }}</style><div class="egspo">
<div class="key"><span>entropy 0<span class="bar"></span>{{ "%.2f" | format(most) }} nats and more</span>
<span><span class="t high" style="--h:0">underlined</span>: high entropy, full update</span>
<span>{{ completions | length }} completions, {{ num_tokens }} tokens; hover over one</span></div>
{%- for c in completions %}
{%- set verdict = "right" if c.is_correct else "wrong" %}
{%- set number = c.rollout_batch %}
{%- if loop.changed(number, c.run) -%}
<h2>Rollout batch {{ number }}{% if has_runs %} of {{ c.run | text }}{% endif %}</h2>
{%- endif -%}
<article class="{{ verdict }}"><dl>
<div><dt>problem</dt><dd dir="auto">{{ c.problem | text }}</dd></div>
<div><dt>answer</dt><dd dir="auto">{{ c.extracted | text if c.extracted is string else "none found" }}</dd></div>
<div><dt>gold answer</dt><dd dir="auto">{{ c.gold | text }}</dd></div>
<div><dt>verdict</dt><dd dir="auto">{{ verdict }}, reward {{ "%g" | format(c.reward) }}, {{ c.length }} tokens
{%- if c.is_truncated %}, cut at the length limit{% endif %}
{%- if c.is_masked is true %}, masked: not in the loss{% endif %}</dd></div></dl><div class="text" dir="auto">
{%- for t in tokens[c.run, c.completion_id] %}
{%- set opacity = darkest * ([[t.entropy / most, 0.0] | max, 1.0] | min) -%}
<span class="t{{ " high" if t.is_high_entropy }}" style="--h:{{ "%.2f" | format(opacity) }}" data-v="{{ t | values }}">
{{- t.token | text or "\u2205" }}</span>
{%- endfor %}</div></article>
{%- endfor %}
{{- "</div>" | safe }}"""
DARKEST = 0.85
"""Background opacity of the highest entropy; dark text on it keeps a contrast above 5 to 1."""


class ColoredCompletions:
    """Completions as HTML: a notebook shows the object itself.

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
        environment = Environment(autoescape=True)
        environment.filters |= {"text": shown, "values": _values}
        groups = self.tokens.groupby(["run", "completion_id"], sort=False)
        return environment.from_string(TEMPLATE).render(
            style=STYLE,
            darkest=DARKEST,
            most=self.most,
            completions=self.completions.to_dict("records"),
            tokens={key: rows.to_dict("records") for key, rows in groups},
            num_tokens=f"{len(self.tokens):,}",
            has_runs=self.completions["run"].nunique() > 1,
        )


def _values(token: dict[str, Any]) -> str:
    """Recorded values of a token, one a line, with control characters replaced."""
    gate = gate_of(token["is_high_entropy"], token.get("is_masked") is True)  # absent from earlier records
    rows = [("position", str(token["position"])), ("gate", gate)]
    rows += [(field.label, f"{token[field.column]:.4g} {field.unit}".rstrip()) for field in FIELDS]
    width = max(len(label) for label, _ in rows)
    return "\n".join(
        [
            f"token \u201c{visible(token['token'], spaces=True)}\u201d, id {token['token_id']}",
            *(f"{label:<{width}} {value}" for label, value in rows),
            f"problem {visible(token['problem_id'])}, completion {token['completion_id']}",
        ]
    )
