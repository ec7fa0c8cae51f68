"""Small files whose headers announce much: what readers must refuse before they take the memory."""

from __future__ import annotations

import bz2
import io
import lzma
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clickme_shards import click_map, jpeg, masked, picture

HUGE = 10**10
#: More than the readers allow, and than the processes that read these files have.
BIG = 3 * 2**30


# ---------------------------------------------------------------------------- tar


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def plain(name: str) -> tarfile.TarInfo:
    return tarfile.TarInfo(name)


def sparse_pax() -> bytes:
    member = plain("a.jpg")
    member.pax_headers = {
        "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.jpg",
        "GNU.sparse.realsize": str(HUGE),
    }  # fmt: skip
    return tar_of((member, f"1\n{HUGE}\n0\n".encode().ljust(512, b"\0")))


def header(name: str, size: bytes, kind: bytes, rest: bytes = b"") -> bytes:
    """A header by hand, with its checksum."""
    block = bytearray(512)
    block[: len(name)] = name.encode()
    block[100:108], block[124:136], block[156:157] = b"0000644\0", size, kind
    block[257:265] = b"ustar  \0"
    block[345 : 345 + len(rest)] = rest
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def sparse_old() -> bytes:
    rest = bytearray(155)
    rest[41:53], rest[53:65] = b"%011o\0" % 0, b"%011o\0" % 0
    rest[138:150] = b"\x80" + HUGE.to_bytes(11, "big")  # the real size
    return header("a.jpg", b"%011o\0" % 0, b"S", bytes(rest)) + bytes(1024)


def tar_size(size: int, kind: bytes = b"0") -> Callable[[], bytes]:
    """A member, or a header of names, that says to be so long."""

    def make() -> bytes:
        first = 0xFF if size < 0 else 0x80
        encoded = bytes([first]) + (size % 2**88).to_bytes(11, "big")
        return header("a.jpg", encoded, kind) + bytes(1024)

    return make


def large_member() -> tuple[bytes, int]:
    """A sample whose image is there, and larger than anything that is read."""
    rest = tar_of((plain("a.heatmap.jpg"), jpeg(click_map(1))), (plain("a.cls"), b"7"))
    rest = rest[: rest.rindex(b"7") + 511].rstrip(b"\0")
    rest += bytes(-len(rest) % 512)
    image = header("a.jpg", b"\x80" + (BIG - 2**20).to_bytes(11, "big"), b"0")
    return rest + image, BIG


def tar_loop() -> bytes:
    """Headers of headers, deeper than Python goes."""
    return header("././@LongLink", b"%011o\0" % 0, b"L") * 5000


# ---------------------------------------------------------------------------- zip


def zip_of(files: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind, compresslevel=1) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def npy(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=True)
    return file.getvalue()


def npy_header(shape: str, dtype: str = "'|u1'") -> bytes:
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (63 - (10 + len(text)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def npz_of(**changed: bytes) -> bytes:
    files = {"image": npy(picture(1)), "heatmap": npy(click_map(1)), "label": npy(np.array(7))}
    return zip_of({f"{name}.npy": content for name, content in {**files, **changed}.items()})


def npz_bomb() -> bytes:
    """Zeros, a thousandth of themselves."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("heatmap.npy", npy(click_map(1)))
        archive.writestr("label.npy", npy(np.array(7)))
        with archive.open("image.npy", "w") as member:
            member.write(npy_header("(24000, 8000, 3)"))
            for _ in range(576):
                member.write(bytes(10**6))
    return file.getvalue()


def zip_lies(size: int) -> Callable[[], bytes]:
    """The directory says another size of the image, in its fields of 64 bits."""

    def make() -> bytes:
        content = bytearray(npz_of())
        at = content.index(b"PK\x01\x02")
        length, extra = struct.unpack_from("<HH", content, at + 28)
        content[at + 20 : at + 28] = b"\xff" * 8
        content[at + 30 : at + 32] = struct.pack("<H", extra + 20)
        place = at + 46 + length
        content[place:place] = struct.pack("<HHQQ", 1, 16, size, size)
        end = content.index(b"PK\x05\x06")
        (directory,) = struct.unpack_from("<I", content, end + 12)
        struct.pack_into("<I", content, end + 12, directory + 20)
        return bytes(content)

    return make


# ---------------------------------------------------------------------------- PyTorch


def pth_of(**changed: Any) -> bytes:
    values = {
        "image": torch.tensor(picture(1)).permute(2, 0, 1),
        "heatmap": torch.tensor(click_map(1))[None],
        "label": torch.tensor([7], dtype=torch.int32),
    }
    file = io.BytesIO()
    torch.save({**values, **changed}, file)
    return file.getvalue()


def stride_zero() -> bytes:
    wide = torch.zeros(1, dtype=torch.uint8)
    return pth_of(image=wide.expand(3, 24000, 24000), heatmap=wide.expand(1, 24000, 24000))


def storage_lies() -> bytes:
    """A storage of more bytes than its file in the archive."""
    files = unzipped(pth_of())
    name = next(name for name in files if name.endswith("data.pkl"))
    size = 3 * 256 * 256
    files[name] = files[name].replace(struct.pack("<I", size), struct.pack("<I", 2**31 - 1))
    return zip_of(files)


def unzipped(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def deflated() -> bytes:
    """Its archive compressed, which PyTorch does not do."""
    wide = torch.zeros(3, 9000, 11000, dtype=torch.uint8)
    return zip_of(unzipped(pth_of(image=wide)), zipfile.ZIP_DEFLATED)


class Calls:
    """Pickled as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def memory_by_number(function: Any, number: int) -> Callable[[], bytes]:
    def make() -> bytes:
        files = unzipped(pth_of())
        name = next(name for name in files if name.endswith("data.pkl"))
        files[name] = pickle.dumps({"image": Calls(function, number)}, protocol=2)
        return zip_of(files)

    return make


# ---------------------------------------------------------------------------- pictures


def png_size(width: int, height: int) -> bytes:
    """A whole picture of zeros."""
    row = zlib.compressobj(1)
    data = b"".join(row.compress(bytes(1 + 3 * width)) for _ in range(height)) + row.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", data), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def jpeg_size(width: int, height: int) -> bytes:
    content = bytearray(jpeg(picture(1)))
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def webp_size(width: int, height: int) -> bytes:
    """An extended WebP with a canvas of this size, around a small picture."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture(1)[:8, :8]).save(file, "WEBP", lossless=True)
    inner = file.getvalue()[12:]
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<IB3x", 10, 2) + canvas
    body += b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    frame = struct.pack("<3s3s3s3s3sB", b"\0" * 3, b"\0" * 3, b"\7\0\0", b"\7\0\0", b"\1\0\0", 0)
    body += b"ANMF" + struct.pack("<I", len(frame) + len(inner)) + frame + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


def other_picture(kind: str, width: int, height: int) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture(1)[:8, :9]).save(file, kind)
    content = bytearray(file.getvalue())
    if kind == "BMP":
        content[18:26] = struct.pack("<ii", width, height)
    elif kind == "GIF":
        content[6:10] = struct.pack("<HH", min(width, 65535), min(height, 65535))
    elif kind == "PPM":
        return b"P6\n%d %d\n255\n" % (width, height) + bytes(99)
    else:
        for tag, value in ((256, width), (257, height)):
            for form, size in (("<HHIH", 3), ("<HHII", 4)):
                entry = struct.pack(form, tag, size, 1, 9 if tag == 256 else 8)
                if entry in content:
                    at = content.index(entry)
                    content[at : at + 12] = struct.pack("<HHII", tag, 4, 1, value)
    return bytes(content)


# ---------------------------------------------------------------------------- TFRecord


def record_length(length: int) -> bytes:
    """The head of a record, whose checksum is right."""
    data = length.to_bytes(8, "little")
    return data + masked(data)


def many_numbers() -> bytes:
    """A record of one feature with 64 million integers, a list of which takes eight times that."""
    values = bytes(2**26)
    packed = b"\x0a" + varint(len(values)) + values
    feature = b"\x1a" + varint(len(packed)) + packed
    entry = b"\x0a\x05label\x12" + varint(len(feature)) + feature
    features = b"\x0a" + varint(len(entry)) + entry
    return b"\x0a" + varint(len(features)) + features


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value % 128 + 128])
        value //= 128
    return out + bytes([value])


def unchecked(data: bytes) -> bytes:
    """Framed, for who reads without checksums: to compute them by hand takes minutes."""
    return record_length(len(data)) + data + bytes(4)


# ---------------------------------------------------------------------------- all of them

#: Name of the file, and its content; or its beginning, and how long it is made.
Bomb = Callable[[], "bytes | tuple[bytes, int]"]

TAR: dict[str, Bomb] = {
    "sparse, pax": sparse_pax,
    "sparse, old": sparse_old,
    "a member beyond the end": tar_size(HUGE),
    "a member of 2**60": tar_size(2**60),
    "a member below 0": tar_size(-512),
    "a long name of 10 GB": tar_size(HUGE, b"L"),
    "extended headers of 10 GB": tar_size(HUGE, b"x"),
    "extended headers below 0": tar_size(-512, b"x"),
    "a long name in a large file": lambda: (tar_size(BIG - 4096, b"L")(), BIG),
    "a large member": large_member,
    "headers of headers": tar_loop,
    "gzip": lambda: zlib.compress(tar_of((plain("a.jpg"), bytes(10**6))), 9, wbits=31),
    "bzip2": lambda: bz2.compress(tar_of((plain("a.jpg"), bytes(10**6)))),
    "xz": lambda: lzma.compress(tar_of((plain("a.jpg"), bytes(10**6)))),
}
FILES: dict[str, tuple[str, Bomb]] = {
    "npz, zeros": ("npz", npz_bomb),
    "npz, a shape": ("npz", lambda: npz_of(image=npy_header(f"({HUGE}, 3)") + bytes(99))),
    "npz, a shape of 0 and more": ("npz", lambda: npz_of(image=npy_header("(0, 2**62)"))),
    "npz, a type": ("npz", lambda: npz_of(image=npy_header("(3,)", f"'V{2**31 - 1}'"))),
    "npz, a nested type": (
        "npz", lambda: npz_of(image=npy_header("(3,)", f"[('a', '<f8', ({2**30},))]")),
    ),
    "npz, a deep header": ("npz", lambda: npz_of(image=npy_header("(" * 9000))),
    "npz, many signs": ("npz", lambda: npz_of(image=npy_header("(" + "-" * 9000 + "1,)"))),
    "npz, objects": ("npz", lambda: npz_of(label=npy(np.array({"a": 1}, object)))),
    "npz, a size of 64 bits": ("npz", zip_lies(2**40)),
    "npz, a size below 0": ("npz", zip_lies(2**63 + 5)),
    "npz, a large file": ("npz", lambda: (b"PK\x03\x04", BIG)),
    "pth, stride 0": ("pth", stride_zero),
    "pth, a storage that lies": ("pth", storage_lies),
    "pth, compressed": ("pth", deflated),
    "pth, bytearray": ("pth", memory_by_number(bytearray, BIG)),
    "pth, tensor": ("pth", memory_by_number(torch.FloatTensor, BIG)),
    "pth, storage": ("pth", memory_by_number(torch.UntypedStorage, BIG)),
    "pth, meta": ("pth", lambda: pth_of(image=torch.zeros(3, 10**5, 10**5, device="meta"))),
    "pth, sparse": (
        "pth",
        lambda: pth_of(image=torch.sparse_coo_tensor(
            torch.zeros(3, 0), (), (3, 10**6, 10**6), check_invariants=True
        )),
    ),
    "pth, a large file": ("pth", lambda: (b"PK\x03\x04", BIG)),
}  # fmt: skip
RECORDS: dict[str, Bomb] = {
    "a large record": lambda: (record_length(BIG - 16), BIG),
    "many numbers": lambda: unchecked(many_numbers()),
}
PICTURES: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: png_size(13300, 13300),
    "PNG, a header": lambda: png_header(2**31 - 1, 2**31 - 1),
    "JPEG": lambda: jpeg_size(65500, 65500),
    "WEBP": lambda: webp_size(13000, 13000),
    "BMP": lambda: other_picture("BMP", 2**30, 2**30),
    "GIF": lambda: other_picture("GIF", 65535, 65535),
    "PPM": lambda: other_picture("PPM", 10**6, 10**6),
    "TIFF": lambda: other_picture("TIFF", 10**6, 10**6),
}


def png_header(width: int, height: int) -> bytes:
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


def put(path: Path, content: bytes | tuple[bytes, int]) -> Path:
    """Writes a file; of one that is made long, the rest takes no room on the disk."""
    data, size = content if isinstance(content, tuple) else (content, len(content))
    path.write_bytes(data)
    os.truncate(path, size)
    return path
