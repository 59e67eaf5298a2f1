"""math-verify's LaTeX parser, made several times faster without another result: ANTLR's two-stage parsing.

ANTLR predicts with the full context (LL), which it does not cache; with the quick SLL prediction it either gives the
same tree or reports a syntax error (see ``PredictionMode.SLL``), and then the full one has its turn.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from antlr4 import CommonTokenStream, PredictionMode
from latex2sympy2_extended.antlr_parser import PSParser


def install() -> None:
    """Make the parser of this process parse in two stages; may be called again."""
    if not hasattr(PSParser.math, "__wrapped__"):
        PSParser.math = _in_two_stages(PSParser.math)


def _in_two_stages(rule: Any) -> Any:
    @wraps(rule)
    def quick_then_full(parser: Any) -> Any:
        parser._interp.predictionMode = PredictionMode.SLL
        try:
            return rule(parser)
        except MemoryError:
            raise
        except Exception:  # as which its error listener reports errors, also those of the lexer: both start again
            lexer = parser.getTokenStream().tokenSource
            lexer.reset()
            parser.setTokenStream(CommonTokenStream(lexer))
            parser._interp.predictionMode = PredictionMode.LL
            return rule(parser)

    return quick_then_full
