"""The one limit on sizes, and the one error of files that cannot be read."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import stat
import struct
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from .text import shown

__all__ = [
    "MAX_BYTES",
    "UnreadableError",
    "check_size",
    "looks_like",
    "open_file",
    "read_file",
    "reading",
]

#: Largest number of bytes that one sample may take where it is read: a record, a file in an
#: archive, the arrays of a file, the pixels of an image (three bytes each: 89 million pixels, from
#: which on Pillow warns). Readers take another one as ``max_bytes``.
MAX_BYTES = 2**28

#: Of files that are opened, as far as the system has them: not for processes that are started, not
#: waiting for who is at the other end of a pipe.
_OPEN = sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NONBLOCK", "O_BINARY"))
#: Of files that are written: no link is followed either.
FLAGS = _OPEN | getattr(os, "O_NOFOLLOW", 0)

#: What decoders raise for contents that they do not understand, beside OSError without a number.
#: RuntimeError is also that of memory that PyTorch does not get.
_CONTENT = (
    *(ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError),
    *(MemoryError, RuntimeError, SyntaxError, TypeError, ValueError, Warning, struct.error),
    *(zlib.error, zipfile.BadZipFile, tarfile.TarError, pickle.PickleError),
    tokenize.TokenError,  # NumPy's, of headers
)
#: What the system says of a name behind which there is no file.
_NO_FILE = (
    *(errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM),
    errno.EINVAL,  # of a place in a file that its content asks for, below 0
)
#: How files begin that are taken for others.
_BEGINNINGS = {
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ\0": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive",
    b"PK\x03\x04": "a zip archive",
    b"PK\x05\x06": "an empty zip archive",
    b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "PostScript",
    b"%PDF": "a PDF",
    b"\x89PNG": "a PNG",
    b"\xff\xd8\xff": "a JPEG",
    b"version https://git-lfs": "a pointer of Git LFS, not the file",
}


class UnreadableError(ValueError):
    """A file, or a part of it, cannot be read as what it should be; the text names it.

    Readers with ``on_error="skip"`` leave it out and count it.
    """


@contextlib.contextmanager
def reading(what: object, expected: str = "") -> Iterator[None]:
    """Turns whatever a library raises of a file's content into an ``UnreadableError``.

    Args:
        what: the name of what is read, to begin the text with.
        expected: the form that was expected, such as "a PNG".

    Raises:
        UnreadableError: in the place of errors of content, of memory that the content asks for,
            and of a name without a file. Errors of the system and missing packages pass.
    """
    try:
        yield
    except UnreadableError:
        raise
    except OSError as error:
        if error.errno is not None and error.errno not in _NO_FILE:
            raise
        reason = error.strerror or str(error)
        raise UnreadableError(_text(what, expected, reason)) from error
    except _CONTENT as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise UnreadableError(_text(what, expected, reason)) from error


def _text(what: object, expected: str, reason: str) -> str:
    wanted = f"expected {expected}, got " if expected else "cannot be read: "
    return f"{shown(what)}: {wanted}{shown(reason)}"


def check_size(what: object, size: int, max_bytes: int) -> None:
    """Compares a size that a header announces with the limit.

    Raises:
        UnreadableError: it is larger, or below 0.
    """
    if not 0 <= size <= max_bytes:
        raise UnreadableError(
            f"{shown(what)}: expected at most {max_bytes} bytes, its header says {size}; pass a "
            f"larger max_bytes if that is right"
        )


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file, opened by its name and nothing else; links to one are followed.

    Raises:
        UnreadableError: there is none, it may not be read, or it is a folder, a device or a pipe,
            which might never end.
    """
    with reading(path):
        descriptor = os.open(path, os.O_RDONLY | _OPEN)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnreadableError(f"{shown(path)}: expected a file, got a folder, a device or a pipe")
    return os.fdopen(descriptor, "rb")


def read_file(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a file of at most ``max_bytes``.

    Raises:
        UnreadableError: it is larger, or none, as in ``open_file``.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        check_size(path, size, max_bytes)
        with reading(path):
            return file.read(max_bytes)


def looks_like(head: bytes) -> str:
    """The kind of file that begins like this, in words; "" where that says nothing."""
    for beginning, name in _BEGINNINGS.items():
        if head.startswith(beginning):
            return name
    if head[:1] == b"\x78" and len(head) > 1 and (head[0] << 8 | head[1]) % 31 == 0:
        return "compressed with zlib"
    if head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html", b"<?xml", b"<head")):
        return "a page of the web"
    return ""
