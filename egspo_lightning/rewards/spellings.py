r"""Spellings of LaTeX and plain text that mean the same, as rules that rewrite them to one of them."""

from __future__ import annotations

import re
from collections.abc import Callable

Rules = list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]]

_NAMES = {
    "greek": "alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega pi Gamma Delta Theta Lambda Xi Sigma Upsilon Phi Psi Omega",
    "functions": "arcsin arccos arctan arccot sinh cosh tanh sin cos tan cot csc log ln exp gcd lcm",
}
GREEK, _FUNCTIONS = (names.split() for names in _NAMES.values())
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_BASES |= {"twelve": 12, "sixteen": 16}
_MONEY = {
    r"\\$": r"USD|[A-Z]{1,2}\\?\$",
    "€": r"EUR|\\euro@",
    "£": r"GBP|\\pounds@|\\textsterling@",
    "¥": r"JPY|CNY|RMB|\\yen@",
    "₹": r"INR|Rs\.?",
}
"""Sign of a currency to its other names before a number."""


def _rules(*rules: tuple[str, str | Callable[[re.Match[str]], str]]) -> Rules:
    """Compile patterns in which @ stands for: no letter follows."""
    return [(re.compile(pattern.replace("@", "(?![A-Za-z])")), replacement) for pattern, replacement in rules]


def _column(rows: str) -> str:
    """Spell a column as a tuple."""
    parts = ",".join(row.strip() for row in rows.split("\\\\") if row.strip())
    return f"({parts})"


def _matrix(rows: str) -> str:
    inner = re.sub(r"\]\s*,\s*\[", r"\\\\", rows.strip("[] ")).replace(",", "&")
    return rf"\begin{{pmatrix}}{inner}\end{{pmatrix}}"


SPACING = _rules(
    (r"\\(?:left|right|middle)\s*\.|\\(?:left|right|middle)@|\\[bB]igg?[lr]?@|\\(?:no)?limits@|\\!\s*", ""),
    (r"\\(?:display|text|script)style@|\\(?:bf|rm|it|boldmath|normalfont)@", ""),
    (r"\\(?:text)?color\s*\{[^{}]*\}|\\(?:checkmark|blacksquare|qed)@", ""),
    (r"\\(?:tiny|small|normalsize|[lL]arge|LARGE|[hH]uge)@", ""),
    (r"(?<!\\)\\[\[\]()]|(?<!\\)\\(?:[,;:> \n]|$)|~|\\q?quad|\\(?:thin|med|thick|en)space@|\\[hv]space\{[^{}]*\}", " "),
    (r"\\(?:SI|qty)\{([^{}]*)\}(?=\{)|\\(?:si|unit)(?=\{)", r"\1\\unit"),
    (r"\\unit\{([^{}]*)\}", lambda match: rf"\text{{{match[1].replace(chr(92), ' ')}}}"),  # of siunitx
)
_GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
_ARGUMENT = r"\s*(\\[A-Za-z]+|[^\s{}\\])"
SYNONYMS = _rules(
    (r"\\[dtc]frac@", r"\\frac"),
    (r"\\[dt]binom@", r"\\binom"),
    (r"\\var(epsilon|phi|theta|rho|sigma)@", r"\\\1"),
    (r"\\(le|ge|ne)q(?:slant)?@", r"\\\1"),
    (r"<=|≦", r"\\le "),
    (r">=|≧", r"\\ge "),
    (r"!=|\\not\s*=", r"\\ne "),
    (r"\\lt@", "<"),
    (r"\\gt@", ">"),
    (r"\\varnothing@|\\\{\s*\\\}|^(?:\\text\{)?[Nn]o (?:real )?solutions?\}?$", r"\\emptyset "),
    (r"\\langle@", "("),
    (r"\\rangle@", ")"),
    (r"\\lbrace@", r"\\{"),
    (r"\\rbrace@", r"\\}"),
    (r"\\[lr]?vert@|\\mid@", "|"),
    (r"\\(?:[lcv]?dots[bcm]?)@|\.\.\.+", r"\\ldots "),
    (r"\\degree@|\^\s*\{\s*\\circ\s*\}|\^\s*\\circ@|(?<=\d)\s*\^\s*\{?(?:o@|\\text\{o\})\}?", r"^\\circ "),
    (r"\\mathbb\s+([A-Z])", r"\\mathbb{\1}"),
    (r"(?:\\text\{)?(?<![A-Za-z\\])all (?:real numbers|reals)\}?", r"\\mathbb{R}"),
    (r"^\]([^\[\]]*,[^\[\]]*[\[\]])$", r"(\1"),  # ]1,2[ is (1,2)
    (r"^([(\[][^\[\]]*,[^\[\]]*)\[$", r"\1)"),
    (r"\\begin\{cases\}(.*?)(?:\\\\\s*)?\\end\{cases\}", lambda match: match[1].replace(r"\\", ", ")),
    (r"\{?\s*([^{}\\]+)\\choose\s*([^{}\\]+)\}?", r"\\binom{\1}{\2}"),
    # numbers of combinations and permutations
    (r"(?<!\w)(\d{1,3})([CP])(\d{1,3})(?!\w)", r"\2_{\1}^{\3}"),
    (r"(?<![A-Za-z\\])n([CP])r\s*\(\s*(\d{1,3})\s*,\s*(\d{1,3})\s*\)", r"\1_{\2}^{\3}"),
    (r"(?:\{\s*\}|^)\s*[_^]\s*\{?(\d{1,3})\}?\s*([CP])\s*_\s*\{?(\d{1,3})\}?", r"\2_{\1}^{\3}"),
    (r"(?<!\w)0x([0-9A-Fa-f]+)$", lambda match: match[1].upper() + "_{16}"),
    (r"(?<![A-Za-z\\])abs\s*\(([^()]*)\)", r"|\1|"),
    (r"\\lg@", r"\\log"),
    (r"\\[bp]mod@", r"\\mod "),
    (r"\\imath@|\\text\{\s*i\s*\}", "i"),
    (r"\\text\{\s*(?:(e)|(d))\s*\}(?(2)(?=\s*[\\A-Za-z]))", r"\1\2"),
    (r"\^\s*(?:\{\s*)?\\(?:top|intercal|text\{T\})(?:\s*\})?", "^T"),
    (r"\\text\{\s*(" + "|".join(_FUNCTIONS) + r")\s*\}", r"\\\1 "),
    # an ordinal's th
    (r"(?<=\d)\s*\^\s*(?:\{\s*)?\\text\{(?:st|nd|rd|th)\}(?:\s*\})?|(?<=\d)(?:st|nd|rd|th)\b", ""),
    (r"^(\d+)\s*\^\s*\{(?:st|nd|rd|th)\}$", r"\1"),
    # subscripts
    (r"_\s*(?:\{\s*)?\\text\{\s*([A-Za-z0-9]+)\s*\}(?:\s*\})?|_\s*\{\s*\\(max|min)\s*\}", r"_{\1\2}"),
    (r"_\s*\{\s*([A-Za-z0-9])\s*\}(?![A-Za-z0-9])", r"_\1"),
    (r"(?<=[0-9A-F)])_\s*\{?(" + "|".join(_BASES) + r")\}?@", lambda match: f"_{{{_BASES[match[1]]}}}"),
    (r"(?<=\d)\s*(?:\\text\{\s*)?(?:\(?\s*)base[\s~]*(\d{1,2})(?:\s*\)|\s*\})*$", r"_{\1}"),
    (r"^\((\w+)\)_", r"\1_"),
    # money
    (
        r"(?<![\d.])(\d[\d,]*)\s*(?:\\text\{\s*)?dollars?,?\s*(?:and@)?\s*\}?\s*(\d\d)\s*(?:\\text\{\s*)?cents?@\s*\}?",
        r"\\$\1.\2",
    ),
    *((rf"^(-?)\s*(?:\\text\{{\s*)?(?:{names})\s*\}}?\s*(?=-?[\d.])", rf"\1{sign}") for sign, names in _MONEY.items()),
    # separators
    (r"\{,\}", ","),
    (
        r"^\[([^\[\];]*[^\[\];\d][^\[\];]*(?:;[^\[\];]*[^\[\];\d][^\[\];]*)+)\]$",
        lambda match: _matrix(match[1].replace(";", "],[")),
    ),
    (r"\s*[,;]?\s*(?:\\text\{\s*,?\s*and\s*\}|(?<![A-Za-z\\])and@|\\land@|;)\s*", ", "),
    (r"\s*,?\s*(?:\\text\{\s*,?\s*or\s*\}|(?<![A-Za-z\\])or(?![a-z])|\\(?:lor|vee)@)\s*", " or "),
    # plain notation
    (r"\*\*", "^"),
    (r"(?<![\\A-Za-z])(" + "|".join([*_FUNCTIONS, *GREEK]) + r")@", r"\\\1 "),
    (r"(?<![\\A-Za-z])(?:infinity|inf|oo)@", r"\\infty "),
    (r"(?<![\\A-Za-z])sqrt@", r"\\sqrt"),
    (r"(?<![\\A-Za-z])cbrt@", r"\\sqrt[3]"),
    (r"\\sqrt(\[3\])?\s*\(([^()]*(?:\([^()]*\)[^()]*)*)\)", r"\\sqrt\1{\2}"),
    (r"\^\s*\(([^()]*)\)", r"^{\1}"),
    (r"(?<=\d)\s*[xX*]\s*(?=10\s*\^)", r"\\times "),
    (r"(?<![\w.\\^])(\d+\.?\d*|\.\d+)[eE]\+?(-?\d{1,4})(?![\w.])", r"\1\\times10^{\2}"),
    (r"(?<=\d)\.(?=\s*[/*])", ""),  # -1./3
    (r"(?<=\d)\s*(?:\\text\{\s*to\s*\}|to)\s*(?=\d+$)", ":"),
    # matrices; a column is a tuple
    (r"\[\s*(\[[^\[\]]*\](?:\s*,\s*\[[^\[\]]*\])+)\s*\]", lambda match: _matrix(match[1])),
    (
        r"\\begin\{([bp]matrix)\}((?:[^&,\\]|\\(?![\\e]))*(?:\\\\(?:[^&,\\]|\\(?![\\e]))*)+)\\end\{\1\}",
        lambda match: _column(match[2]),
    ),
    (r"^\(([^()]*,[^()]*)\)\^\{?T\}?$", r"(\1)"),
    # arguments without braces
    (rf"(\\(?:frac|binom))@{_ARGUMENT}", r"\1{\2}"),
    (rf"(\\(?:frac|binom)\s*{_GROUP}){_ARGUMENT}", r"\1{\2}"),
    (r"(\\sqrt(?:\s*\[[^\[\]]*\])?)@\s*(?!\[)(\\[A-Za-z]+|\d+|[^\s{}\\\[])", r"\1{\2}"),
    (rf"\^\s*(\\frac\s*{_GROUP}\s*{_GROUP})", r"^{\1}"),
)
