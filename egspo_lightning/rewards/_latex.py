r"""Parses normalized LaTeX to sympy by latex2sympy, with symbols that are read alike in every text.

latex2sympy ignores the case of symbols, takes ``\gamma`` for a function, ``I`` for the imaginary unit and ``dn`` for a
differential, drops primes, and cannot read many commands. Symbols are spelled as its ``\variable{}`` instead.
"""

from __future__ import annotations

import re
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from antlr4 import PredictionMode
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
from sympy import Float, Rational

from egspo_lightning.rewards.numbers import parse_number

_CACHED = 4096
# Commands that latex2sympy reads; all others are symbols.
_KNOWN = (
    "frac|binom|sqrt|sum|prod|lim|int|to|log|ln|exp|sin|cos|tan|csc|sec|cot|arcsin|arccos|arctan|arccsc|arcsec|arccot"
    "|sinh|cosh|tanh|arsinh|arcosh|artanh|arcsinh|arccosh|arctanh|floor|ceil|gcd|lcm|max|min|det|mod|times|cdot|div"
    "|over|infty|le|ge|ne|in|notin|cup|cap|setminus|emptyset|lfloor|rfloor|lceil|rceil|pi|circ"
)
_GREEK = "alpha|beta|delta|epsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|chi|psi|omega"
_KNOWN_COMMAND = re.compile(rf"\\(?:{_KNOWN})(?![A-Za-z])|\\(?:begin|end|mathbb)\{{[^{{}}]*\}}(?:\{{[clr|]*\}})?")
_SYMBOL = re.compile(
    r"(?:\\(?:overline|bar|vec|hat|tilde|dot|ddot|math(?:cal|frak|scr|bb)|text)\s*\{[^{}]*\}|\\[A-Za-z]+|[A-Za-z]"
    r"|\d+(?:\.\d+)?(?=_))"
    r"(?:\s*(?:'+|_\s*(?:\w|\\[A-Za-z]+|\{(?:[^{}]|\{[^{}]*\})*\})|\^\s*\{?(?:\\prime\s*)+\}?))*"
)
_PLAIN = re.compile(rf"[a-zA-Z]|\\(?:{_GREEK})")
_CALLED = frozenset(["f", "g", "h", "F", "G", "H", r"\Gamma"])  # functions before a bracket
_ANGLE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\\circ")
_INDEXED = (r"\sum", r"\prod", r"\lim", r"\int", r"\log", r"\max", r"\min")
_BARE_INDEX = re.compile(r"\\(?:sum|prod|lim|int)(?![A-Za-z])|\\frac\{d")


class _Parser(_Latex2Sympy):
    """Parses in two stages: SLL prediction reads almost every text, and full LL, which is slow, the rest."""

    def create_parser(self, latex_str: str) -> Any:
        parser = super().create_parser(latex_str)
        parser._interp.predictionMode = PredictionMode.SLL
        try:
            tree = parser.math()
        except Exception:  # latex2sympy's listener raises it for a syntax error
            parser = super().create_parser(latex_str)
            parser._interp.predictionMode = PredictionMode.LL
            tree = parser.math()
        return SimpleNamespace(math=lambda: tree)


@lru_cache(maxsize=_CACHED)
def parse(text: str) -> Any:
    """Return the sympy object of a normalized text without units.

    Raises:
        Exception: latex2sympy cannot parse it.
    """
    if (number := parse_number(text)) is not None:
        top, bottom = number.value.as_integer_ratio()
        value = Rational(top, bottom)
        return Float(value, max(15, len(text))) if number.is_decimal else value
    return _Parser(is_real=True, config=ConversionConfig(lowercase_symbols=False)).parse(spell(text))


def spell(text: str) -> str:
    r"""Spell symbols, indices and primes as ``\variable{}``, the imaginary unit as ``I``, and degrees in angles."""
    text = _DEGREES.sub(r"{\\frac{\1 \\pi}{180}}" if _ANGLE.search(text) else r"\1", text)
    is_bound = _BARE_INDEX.search(text) is not None
    spelled, end = [], 0
    while end < len(text):
        if text.startswith("\\\\", end):
            spelled.append("\\\\")
            end += 2
        elif (known := _KNOWN_COMMAND.match(text, end)) is not None and not text.startswith(("_", "'"), known.end()):
            spelled.append(known[0])
            end = known.end()
        elif known is not None and known[0] in _INDEXED:
            spelled.append(known[0] + "_" * text.startswith("_", known.end()))
            end = known.end() + text.startswith("_", known.end())
        elif (symbol := _SYMBOL.match(text, end)) is not None:
            spelled.append(_spell_symbol("".join(symbol[0].split()), text[symbol.end() :], is_bound))
            end = symbol.end()
        else:
            spelled.append(text[end])
            end += 1
    return "".join(spelled)


def _spell_symbol(name: str, following: str, is_bound: bool) -> str:
    is_called = following.startswith("(")
    if name == "e":
        return "e"
    if name == "i" and not is_bound:
        return "{I}"
    if (is_called and name in _CALLED) or (is_bound and name == "d"):
        return name
    if _PLAIN.fullmatch(name) and name not in "IEdT" and not (is_called and len(name) == 1):
        return name + " "
    name = re.sub(r"\\text\{(.*)\}", r"\1", name) if "_" not in name else re.sub("[{}]", "", name)
    return r"\variable{" + re.sub(r"[^A-Za-z0-9]", lambda match: f"0{ord(match[0]):02x}0", name) + "}"
