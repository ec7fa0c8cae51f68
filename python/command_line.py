"""How the programs end for a reason: with a line, whatever names are in it."""

from __future__ import annotations

from harmonizer_ext.files.text import shown

#: Bad input, full disks, missing packages, a loss that is not finite: said in a line.
EXPECTED = (OSError, ValueError, ImportError, FloatingPointError)


def message(error: BaseException) -> str:
    """The text of an error in one line that no terminal obeys.

    Of an error in a worker of a DataLoader, whose traceback is in the text, the error itself.
    """
    text = str(error)
    if text.startswith("Caught ") and " in DataLoader worker process " in text:
        text = text.rstrip().rpartition("\n")[2].partition(": ")[2]
    return shown(text)
