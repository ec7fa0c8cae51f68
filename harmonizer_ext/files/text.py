"""Names and texts from files, made harmless where they are printed, logged or written to tables."""

from __future__ import annotations

import os
import re
from typing import Any

__all__ = ["cell", "shown"]

#: What spreadsheets take for the beginning of a formula, in the widths in which they take it.
_FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")
#: Where one begins in a part of a text: behind what separates cells in other countries. Quotes in
#: the middle of a line protect nothing there.
_PART = re.compile(rf"([;|]['\"\s]*)(?=[{re.escape(''.join(_FORMULA))}])")


def shown(value: object) -> str:
    r"""The text of a name, in which characters that are not printed are written as escapes.

    Terminal escapes, control characters, newlines, characters that turn the direction of writing,
    and bytes that are no UTF-8 come out as ``\x1b``, ``\n``, ``\u202e`` and ``\xff``. Other texts
    come out as they are.

    Args:
        value: text, a path, or an error, of which its message is taken.

    Example:
        >>> print(shown("red\x1b[31m"), shown("caf\u00e9.png"))
        red\x1b[31m café.png
    """
    text = os.fsdecode(value) if isinstance(value, bytes | os.PathLike) else str(value)
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a name that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode()


def cell(value: Any) -> Any:
    """A cell of a CSV file: numbers as they are, texts such that no spreadsheet computes them.

    Before a text that begins like a formula (``=``, ``+``, ``-``, ``@``, also behind spaces, tabs
    or line breaks) goes an apostrophe, by which spreadsheets know a text; characters that are not
    printed are escaped as ``shown`` does. So it is behind a semicolon or a bar, by which other
    spreadsheets part a line; a tab is escaped. Quoting is left to the module ``csv``.

    Example:
        >>> cell("=1+1"), cell(-1.5), cell("resnet50")
        ("'=1+1", -1.5, 'resnet50')
    """
    if not isinstance(value, str | bytes | os.PathLike):
        return value
    text = os.fsdecode(value) if isinstance(value, bytes | os.PathLike) else value
    begins = text.lstrip()
    risky = begins.startswith(_FORMULA) or text[:1] in ("\t", "\r", "\n")
    return ("'" if risky else "") + shown(_PART.sub(r"\1'", text))
