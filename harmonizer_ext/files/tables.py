"""Tables (CSV) and settings (JSON) that people or other programs have written."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from typing import Any

from .reading import UnreadableError, read_file, reading
from .text import shown

__all__ = ["read_json", "read_lines", "read_rows"]

#: Largest size of a table; a million rows of names take less.
_MOST_BYTES = 2**26


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a UTF-8 file, without what is between them.

    Raises:
        UnreadableError: it cannot be read, is no UTF-8, or larger than 64 MiB.
    """
    return _text(path).split("\n")


def read_rows(
    path: str | os.PathLike[str], columns: Sequence[str], argument: str
) -> list[dict[str, str]]:
    """The rows of a CSV file with a head.

    Args:
        path: of the file.
        columns: that it must have; others are read too.
        argument: that gave the file, for the texts of errors.

    Raises:
        UnreadableError: it cannot be read or lacks a column, or a row ends before one of them; the
            text names the line.
    """
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    with reading(path, "a table (CSV)"):
        head = reader.fieldnames or []
    missing = [name for name in columns if name not in head]
    if missing:
        raise UnreadableError(
            f"{argument}: expected columns {','.join(columns)} in {shown(path)}, got "
            f"{[*head] or 'an empty file'}"
        )
    rows = []
    with reading(path, "a table (CSV)"):
        for row in reader:
            missing = [name for name in columns if row[name] is None]
            if missing:
                raise UnreadableError(
                    f"{argument}: expected columns {','.join(columns)} in line "
                    f"{reader.line_num} of {shown(path)}, got no {','.join(missing)}"
                )
            rows.append(row)
    return rows


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value of a JSON file.

    Raises:
        UnreadableError: it cannot be read, is no JSON, or larger than 64 MiB.
    """
    text = _text(path)
    with reading(path, "JSON"):
        return json.loads(text)


def _text(path: str | os.PathLike[str]) -> str:
    data = read_file(path, _MOST_BYTES)
    with reading(path, "text in UTF-8"):
        return data.decode("utf-8-sig")
