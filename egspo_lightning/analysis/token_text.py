"""Visible text: control characters and direction marks replaced by printable signs."""

import unicodedata

BIDI_CONTROLS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Direction marks: they reorder the text after them, so that it reads differently."""


def visible(text: str, *, spaces: bool = False) -> str:
    """Replace each control character (by U+2400 to U+2421), direction mark and lone surrogate by a printable sign.

    Args:
        text: any text
        spaces: whether to replace spaces (by U+2423) as well
    """
    return "".join(_sign(c) for c in text).replace(" ", "\u2423" if spaces else " ")


def shown(text: str) -> str:
    """Visible text for several lines: a line end becomes a sign and a line end."""
    return visible(text).replace("\u240a", "\u240a\n")


def _sign(c: str) -> str:
    code = ord(c)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if c in BIDI_CONTROLS or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp"):
        return f"<U+{code:04X}>"
    return c
