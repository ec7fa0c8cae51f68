"""Damage of every kind, and checksums that are put right after it, so that none of them tells."""

from __future__ import annotations

import io
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence

#: What sizes, counts and numbers are set to.
NUMBERS = (0, 1, 2, 3, 7, 8, 16, 64, 127, 128, 255, 256, 511, 512, 4096, 32767, 32768, 65535)
NUMBERS += (65536, 2**20, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**33, 2**40, 2**62, 2**63, 2**64 - 1)
#: What texts are set to.
TEXTS = (b"-1", b"1e999", b"nan", b"Infinity", b"9" * 400, b"\0", b"\xff", b"\xef\xbb\xbf", b"../x")
TEXTS += (b"/etc/passwd", b"pipe:touch x;", b"http://127.0.0.1:9/x", b"a::b", b"=1+1", b"\x1b[31m")
TEXTS += (b"{" * 60, b"[" * 60, b'"', b",", b"\r\n", b"%s", b"\xe2\x80\xae", b"True", b"null")
#: Operations of pickles, and names in them.
PICKLED = (
    b"ctorch\nFloatTensor\n",
    b"cbuiltins\nbytearray\n",
    b"cos\nsystem\n",
    b"R",
    b"Q",
    b"b",
    b"\x81",
)
PICKLED += (
    b"ctorch._utils\n_rebuild_sparse_tensor\n",
    b"\x8a\x08" + b"\x7f" * 8,
    b"J\xff\xff\xff\x7f",
)
PICKLED += (
    b"2",
    b"0",
    b"(",
    b"t",
    b"\x85",
    b"s",
    b"u",
    b"h\0",
    b"r\xff\xff\xff\x7f",
    b"\x96" + b"\x7f" * 8,
)

Change = Callable[[random.Random, bytearray], None]


def mutated(draw: random.Random, content: bytes, tokens: Sequence[bytes] = ()) -> bytes:
    """One to four changes of a content; one in twenty stays whole."""
    if draw.random() < 0.05:
        return content
    out = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 4))):
        draw.choice(CHANGES)(draw, out)
        if tokens and draw.random() < 0.3:
            token = draw.choice(tokens)
            at = place(draw, out)
            out[at : at + draw.choice((0, len(token)))] = token
    return bytes(out)


def place(draw: random.Random, out: bytearray) -> int:
    """A place anywhere, and more often in the first part, where headers are."""
    most = len(out) if draw.random() < 0.5 else min(len(out), 512)
    return draw.randrange(most + 1)


def flip(draw: random.Random, out: bytearray) -> None:
    for _ in range(draw.choice((1, 1, 4, 32))):
        if out:
            out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)


def overwrite(draw: random.Random, out: bytearray) -> None:
    at, size = place(draw, out), draw.choice((1, 4, 12, 64))
    out[at : at + size] = draw.randbytes(size)


def number(draw: random.Random, out: bytearray) -> None:
    size = draw.choice((1, 2, 4, 8))
    value = draw.choice(NUMBERS) % 2 ** (8 * size)
    at = place(draw, out)
    out[at : at + size] = value.to_bytes(size, draw.choice(("little", "big")))


def digits(draw: random.Random, out: bytearray) -> None:
    """Another number in the place of one that is written in digits."""
    found = list(re.finditer(rb"\d+", bytes(out[:65536])))
    if found:
        one = draw.choice(found)
        out[one.start() : one.end()] = str(draw.choice((*NUMBERS, -1, 10**30))).encode()


def text(draw: random.Random, out: bytearray) -> None:
    at, token = place(draw, out), draw.choice(TEXTS)
    out[at : at + draw.choice((0, len(token)))] = token


def cut(draw: random.Random, out: bytearray) -> None:
    del out[draw.randrange(len(out) + 1) :]


def remove(draw: random.Random, out: bytearray) -> None:
    at = place(draw, out)
    del out[at : at + draw.choice((1, 4, 100, 5000))]


def repeat(draw: random.Random, out: bytearray) -> None:
    at, size = place(draw, out), draw.choice((1, 16, 512, 4096))
    out[at:at] = out[at : at + size] * draw.choice((1, 2, 20))


def move(draw: random.Random, out: bytearray) -> None:
    start, at, size = place(draw, out), place(draw, out), draw.choice((4, 64, 512))
    out[at : at + size] = out[start : start + size]


def append(draw: random.Random, out: bytearray) -> None:
    out += draw.choice((bytes(512), draw.randbytes(64), bytes(out[:600])))


CHANGES: tuple[Change, ...] = (
    *(flip, overwrite, number, digits, text, cut, remove, repeat, move, append),
)


# ---------------------------------------------------------------------------- checksums put right


def tar_checksums(content: bytes) -> bytes:
    """Every block that looks like a header gets the sum of its bytes."""
    out = bytearray(content)
    for at in range(0, len(out) - 511, 512):
        if out[at + 257 : at + 262] == b"ustar":
            out[at + 148 : at + 156] = b"        "
            out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    return bytes(out)


def png_checksums(content: bytes) -> bytes:
    out, at = bytearray(content), 8
    while at + 12 <= len(out):
        (length,) = struct.unpack_from(">I", out, at)
        end = at + 8 + length
        if end + 4 > len(out):
            break
        out[end : end + 4] = struct.pack(">I", zlib.crc32(out[at + 4 : end]))
        at = end + 4
    return bytes(out)


def zip_with(content: bytes, change: Callable[[str, bytes], bytes], compress: bool) -> bytes:
    """The archive with its files changed, and whole again."""
    file = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", kind) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return file.getvalue()


#: Where the lists of an archive begin.
ZIP_TOKENS = (b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7")


def mutated_zip(
    draw: random.Random,
    whole: bytes,
    outside: float,
    changed: Callable[[], Callable[[str], bool]],
    tokens: Sequence[bytes] = (),
    compressed: float = 0.0,
) -> bytes:
    """An archive that is damaged itself, or whole with files in it that are.

    Args:
        draw: what is drawn from.
        whole: the archive.
        outside: how often the archive itself is damaged.
        changed: chooses which files of it are, by their names.
        tokens: of these files' format.
        compressed: how often it is compressed.
    """
    if draw.random() < outside:
        return mutated(draw, whole, ZIP_TOKENS)
    chosen = changed()
    return zip_with(
        whole,
        lambda name, content: mutated(draw, content, tokens) if chosen(name) else content,
        compressed > 0 and draw.random() < compressed,
    )


def is_pickle(name: str) -> bool:
    """Whether a file of a checkpoint holds its pickle."""
    return name.endswith("data.pkl")
