r"""Normalization of answers: one spelling for typesetting, Unicode, plain text and LaTeX shorthand.

Every comparison reads its result, and math-verify does, so both texts of a pair are read alike.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

_CACHED = 4096
Rules = list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]]

_NAMES = {
    "greek": "alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega pi Gamma Delta Theta Lambda Xi Sigma Upsilon Phi Psi Omega",
    "functions": "arcsin arccos arctan arccot sinh cosh tanh sin cos tan cot csc log ln exp gcd lcm",
}
_GREEK, _FUNCTIONS = (names.split() for names in _NAMES.values())
_SYMBOLS = dict.fromkeys("~\u00a0\u2002\u2003\u2009\u202f\u3000", " ")
_SYMBOLS |= dict.fromkeys("\u200b\u2060\ufeff", "") | dict.fromkeys("−–‐‑﹣", "-") | dict.fromkeys("∙⋅·", r"\cdot ")
_SYMBOLS |= {"°": r"^\circ ", "º": r"^\circ ", "℃": r"^\circ C", "℉": r"^\circ F", "√": r"\sqrt ", "∞": r"\infty "}
_SYMBOLS |= {"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∓": r"\mp ", "×": r"\times "}
_SYMBOLS |= {"÷": r"\div ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∉": r"\notin ", "∅": r"\emptyset "}
_SYMBOLS |= {"∖": r"\setminus ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "、": ","}
_SYMBOLS |= {
    "∧": r"\land ",
    "∨": r"\lor ",
    "′": "'",
    "’": "'",
    "…": r"\ldots ",
    "⁄": "/",
    "→": r"\to ",
    "∛": r"\sqrt[3]",
    "✓": "",
    "✔": "",
    "∴": r"\therefore ",
}
_SYMBOLS |= {letter: rf"\mathbb{{{name}}}" for letter, name in zip("ℕℤℚℝℂ", "NZQRC", strict=True)}
_RADICAL = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+|[A-Za-z]))")
_RAISED = re.compile("[⁰¹²³⁴-⁹⁺⁻⁽⁾ⁿⁱ]+|[₀-₉₊₋₍₎ₐ-ₜ]+")
_VULGAR = re.compile(r"([¼-¾⅐-⅞])|(\d+)⁄(\d+)")  # a fraction character, or digits with the fraction slash

_FONT = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|mbox|math(?:rm|bf|it|sf|tt|normal)|boldsymbol|bm|bold|underline|operatorname\*?)"
    r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_ESCAPED = re.compile(r"\\\\(?=[A-Za-z])")  # a doubled backslash, where no matrix has rows


def _rules(*rules: tuple[str, str | Callable[[re.Match[str]], str]]) -> Rules:
    """Compile patterns in which @ stands for: no letter follows."""
    return [(re.compile(pattern.replace("@", "(?![A-Za-z])")), replacement) for pattern, replacement in rules]


_SPACING = _rules(
    (r"\\(?:left|right|middle)\s*\.|\\(?:left|right|middle)@|\\[bB]igg?[lr]?@|\\(?:no)?limits@|\\!\s*", ""),
    (r"\\(?:display|text|script)style@|\\(?:bf|rm|it|boldmath|normalfont)@", ""),
    (r"\\(?:text)?color\s*\{[^{}]*\}|\\checkmark@", ""),
    (r"\\(?:tiny|small|normalsize|[lL]arge|LARGE|[hH]uge)@", ""),
    (r"(?<!\\)\\[\[\]()]|(?<!\\)\\(?:[,;:> \n]|$)|~|\\q?quad|\\(?:thin|med|thick|en)space@|\\[hv]space\{[^{}]*\}", " "),
)
_REMARKS = (
    r"exact(?:ly)?|approx(?:imately)?\.?|about|roughly|around|precisely|rounded|the|my|our|so|thus|hence|therefore"
    r"|final|correct|answer|result|solution|total|value|simplified|is|are|equals|equal to"
)
_REMARK = rf"(?:{_REMARKS})(?![A-Za-z])[\s:,]*"
# Text around an answer that is no part of it.
_WRAPPERS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\*{1,3}([^*]+)\*{1,3}|__(.+)__|\"(.+)\"|``?(.+?)(?:''|`)",
        r"(?:\\text)?\{((?:[^{}\\]|\\.|\{[^{}]*\})*)\}",
        r"(.*[^.,;\s\\])\s*(?:[,;]|\.(?!\.))",
        r"(?:[=:]|\\(?:to|therefore|implies|Rightarrow|approx|sim|simeq|equiv)(?![A-Za-z]))(.+)",
        rf"(?i:(?:{_REMARK}|\\text\{{\s*(?:{_REMARK})+\}}\s*:?)+)(.+)",
        rf"(.*\S)\s*(?i:\(\s*(?:{_REMARK})+\)|\\text\{{\s*\(?\s*(?:{_REMARK})+\)?\s*\}})",
        r"(?:\\text\{)?[A-Z][a-z]{2,}:\s*\}?\s*(.+)",
    )
]
_GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
_ARGUMENT = r"\s*(\\[A-Za-z]+|[^\s{}\\])"
_SYNONYMS = _rules(
    (r"\\[dtc]frac@", r"\\frac"),
    (r"\\[dt]binom@", r"\\binom"),
    (r"\\(le|ge|ne)q(?:slant)?@", r"\\\1"),
    (r"<=|≦", r"\\le "),
    (r">=|≧", r"\\ge "),
    (r"!=|\\not\s*=", r"\\ne "),
    (r"\\lt@", "<"),
    (r"\\gt@", ">"),
    (r"\\varnothing@|\\\{\s*\\\}", r"\\emptyset "),
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
    (r"(?<!\w)(\d{1,3})C(\d{1,3})(?!\w)", r"\\binom{\1}{\2}"),
    (r"(?<!\w)0x([0-9A-Fa-f]+)$", lambda match: match[1].upper() + "_{16}"),
    (r"(?<![A-Za-z\\])abs\s*\(([^()]*)\)", r"|\1|"),
    (r"\\lg@", r"\\log"),
    (r"\\[bp]mod@", r"\\mod "),
    (r"\\imath@|\\text\{\s*i\s*\}", "i"),
    (r"\\text\{\s*(?:(e)|(d))\s*\}(?(2)(?=\s*[\\A-Za-z]))", r"\1\2"),
    (r"\^\s*(?:\{\s*)?\\(?:top|intercal|text\{T\})(?:\s*\})?", "^T"),
    (r"\\text\{\s*(" + "|".join(_FUNCTIONS) + r")\s*\}", r"\\\1 "),
    # an ordinal's th
    (r"(?<=\d)\s*\^\s*(?:\{\s*)?\\text\{(?:st|nd|rd|th)\}(?:\s*\})?|(?<=\d)th\b", ""),
    # subscripts
    (r"_\s*(?:\{\s*)?\\text\{\s*([A-Za-z0-9]+)\s*\}(?:\s*\})?|_\s*\{\s*\\(max|min)\s*\}", r"_{\1\2}"),
    (r"_\s*\{\s*([A-Za-z0-9])\s*\}(?![A-Za-z0-9])", r"_\1"),
    (r"_\s*\{?two\}?@", "_2"),
    (r"(?<=\d)\s*(?:\\text\{\s*)?(?:\(?\s*)base[\s~]*(\d{1,2})(?:\s*\)|\s*\})*$", r"_{\1}"),
    (r"^\((\w+)\)_", r"\1_"),
    # separators
    (r"\{,\}", ","),
    (r"\s*[,;]?\s*(?:\\text\{\s*,?\s*and\s*\}|(?<![A-Za-z\\])and@|\\land@|;)\s*", ", "),
    (r"\s*,?\s*(?:\\text\{\s*,?\s*or\s*\}|(?<![A-Za-z\\])or(?![a-z])|\\(?:lor|vee)@)\s*", " or "),
    # plain notation
    (r"\*\*", "^"),
    (r"(?<![\\A-Za-z])(" + "|".join([*_FUNCTIONS, *_GREEK]) + r")@", r"\\\1 "),
    (r"(?<![\\A-Za-z])(?:infinity|inf|oo)@", r"\\infty "),
    (r"(?<![\\A-Za-z])sqrt@", r"\\sqrt"),
    (r"\\sqrt\s*\(([^()]*(?:\([^()]*\)[^()]*)*)\)", r"\\sqrt{\1}"),
    (r"\^\s*\(([^()]*)\)", r"^{\1}"),
    (r"(?<=\d)\s*[xX*]\s*(?=10\s*\^)", r"\\times "),
    (r"(?<![\w.\\^])(\d+\.?\d*|\.\d+)[eE]\+?(-?\d{1,4})(?![\w.])", r"\1\\times10^{\2}"),
    (r"(?<=\d)\.(?=\s*[/*])", ""),  # -1./3
    (r"\[\s*(\[[^\[\]]*\](?:\s*,\s*\[[^\[\]]*\])+)\s*\]", lambda match: _matrix(match[1])),
    # arguments without braces
    (rf"(\\(?:frac|binom))@{_ARGUMENT}", r"\1{\2}"),
    (rf"(\\(?:frac|binom)\s*{_GROUP}){_ARGUMENT}", r"\1{\2}"),
    (r"(\\sqrt(?:\s*\[[^\[\]]*\])?)@\s*(?!\[)(\\[A-Za-z]+|\d+|[^\s{}\\\[])", r"\1{\2}"),
)
_INTEGER = re.compile(r"-?\d+")
# Spaces have a meaning in "3 1/2", in "\pi r" and after a comma that could separate thousands.
_NEEDLESS_SPACE = re.compile(r"(?<![\w.,])\s+|\s+(?![\w.,])|(?<=,)\s+(?!\d{3}(?!\d))")


@lru_cache(maxsize=_CACHED)
def normalize(text: str) -> str:
    r"""Return one spelling for answers that differ in typesetting, wrappers, Unicode, shorthand or plain notation.

    Nothing that may carry meaning changes: ``(1,234)`` keeps its comma, ``3 1/2`` its space, ``\text{ cm}`` its unit.
    """
    if _INTEGER.fullmatch(text):
        return text
    if r"\begin" not in text:
        text = _ESCAPED.sub(r"\\", text)
    text = _without_dollars(_replace(_SPACING, _from_unicode(text)))
    text = _unwrap(_FONT.sub(r"\\text{\1}", text).strip())
    text = _replace(_SYNONYMS, text).strip()
    return _NEEDLESS_SPACE.sub("", " ".join(text.split()))


def _from_unicode(text: str) -> str:
    if text.isascii():
        return text.replace("~", " ")
    text = _RADICAL.sub(r"\\sqrt{\1\2}", text)
    text = _RAISED.sub(lambda match: ("^" if match[0][0] in "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ" else "_") + _braced(match[0]), text)
    text = _VULGAR.sub(lambda match: "\\frac{" + _plain(match[0]).replace("⁄", "}{") + "}", text)
    return "".join(_SYMBOLS.get(letter) or _letter(letter) if not letter.isascii() else letter for letter in text)


def _without_dollars(text: str) -> str:
    """Remove the delimiters of math; an odd one out is a currency."""
    dollars = re.compile(r"(?<!\\)\$")
    return dollars.sub(" ", text) if len(dollars.findall(text)) % 2 == 0 else text


def _letter(letter: str) -> str:
    if letter in _SYMBOLS:  # an empty replacement
        return ""
    words = unicodedata.name(letter, "").split()
    is_greek = words[:1] == ["GREEK"] and words[2:3] == ["LETTER"] and len(words) == 4
    if is_greek and (name := words[3].lower().replace("lamda", "lambda")) in _GREEK:
        return "\\" + (name.capitalize() if words[1] == "CAPITAL" else name) + " "
    return _plain(letter)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _braced(text: str) -> str:
    return f"{{{_plain(text).replace('−', '-')}}}"


def _replace(rules: Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _unwrap(text: str) -> str:
    before = ""
    while before != text:
        before = text
        for match in filter(None, (pattern.fullmatch(text) for pattern in _WRAPPERS)):
            text = next((part for part in match.groups() if part is not None), "").strip() or text
            break
    return text


def _matrix(rows: str) -> str:
    inner = re.sub(r"\]\s*,\s*\[", r"\\\\", rows.strip("[] ")).replace(",", "&")
    return rf"\begin{{pmatrix}}{inner}\end{{pmatrix}}"
