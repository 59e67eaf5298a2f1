"""Any text, made visible: what would act on a page or a terminal, or show as nothing, becomes a sign for itself."""

import unicodedata

BIDI_CONTROLS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""They reorder the text after them, so that it reads as what it is not."""


def visible(text: str, *, spaces: bool = False) -> str:
    """The text with a sign for each control character (U+2400 to U+2421), direction mark and lone surrogate.

    Args:
        text: anything
        spaces: whether spaces get a sign (U+2423) as well
    """
    return "".join(_sign(c) for c in text).replace(" ", "\u2423" if spaces else " ")


def _sign(c: str) -> str:
    code = ord(c)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if c in BIDI_CONTROLS or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp"):
        return f"<U+{code:04X}>"
    return c
