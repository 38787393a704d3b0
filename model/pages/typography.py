"""Typographic forms of ASCII text: curly quotes, dashes and ligatures, drawn in place of what is written.

Printed pages have them where their text, folded to ASCII, has the plain characters; a reader must know both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from trtvlm.model.pages.fonts import glyphs

# For str.translate: what typographic characters are in ASCII. PDFs have U+0002 and others for a hyphen at a line's end.
TO_ASCII = str.maketrans(
    {
        "ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st",
        "‘": "'", "’": "'", "‚": ",", "“": '"', "”": '"', "„": '"', "′": "'", "″": '"',
        "‐": "-", "‑": "-", "–": "-", "—": "-", "−": "-", "\u0002": "-", "\u00ad": "-", "\ufffe": "-",
        "…": "...", "\u00a0": " ", "\u2009": " ",
    }
)  # fmt: skip
SPECIAL = "‘’“”–ﬁﬂ"
_OPENING_DOUBLE = re.compile(r'(?<![^\s(\[{/-])"(?=\S)')
_OPENING_SINGLE = re.compile(r"(?<![^\s(\[{/\"“-])'(?=\S)")


@dataclass(frozen=True)
class Typesetter:
    """Which forms to draw; only those that the font has are drawn."""

    quotes: bool = False
    ligatures: bool = False

    def __call__(self, text: str, font: str) -> str:
        """Return what to draw for `text` in the font file `font`."""
        there = glyphs(font, SPECIAL)
        if self.quotes and there.issuperset("‘’“”"):
            text = _OPENING_DOUBLE.sub("“", text).replace('"', "”")
            text = _OPENING_SINGLE.sub("‘", text).replace("'", "’")
        if self.quotes and "–" in there:
            text = text.replace(" - ", " – ")
        if self.ligatures and there.issuperset("ﬁﬂ"):
            text = text.replace("fi", "ﬁ").replace("fl", "ﬂ")
        return text
