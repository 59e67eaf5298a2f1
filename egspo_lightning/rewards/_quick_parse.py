"""math-verify's LaTeX parser, made several times faster without another result.

Two-stage parsing: ANTLR predicts with the full context (LL), which it does not cache; with the quick SLL prediction it
either gives the same tree or reports a syntax error (see ``PredictionMode.SLL``), and then the full one has its turn.

Numbers: ``sympy.Number`` of a text runs ``from sympy import *`` each time, for each digit of an answer; a number once
read is kept, and integers are read as such.
"""

from __future__ import annotations

from functools import lru_cache, wraps
from typing import Any

from antlr4 import CommonTokenStream, PredictionMode
from latex2sympy2_extended.antlr_parser import PSParser
from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
from sympy import Integer

from egspo_lightning.rewards import _quick_closure

_KEPT = 4096
_MAX_DIGITS = 40


def install() -> None:
    """Make the parser of this process the quick one; may be called again."""
    if not hasattr(PSParser.math, "__wrapped__"):
        PSParser.math = _in_two_stages(PSParser.math)
        _quick_closure.install()
        _Latex2Sympy.parse_number = _read_once(_Latex2Sympy.parse_number)


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


def _read_once(parse_number: Any) -> Any:
    @lru_cache(maxsize=_KEPT)
    def read(text: str) -> Any:
        if len(text) <= _MAX_DIGITS and text.isascii() and text.isdigit():
            return Integer(int(text))
        return parse_number(None, text)  # it looks at the text alone

    @wraps(parse_number)
    def read_once(_: Any, text: str) -> Any:
        return read(text)

    return read_once
