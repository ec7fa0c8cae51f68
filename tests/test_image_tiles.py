"""Pictures whose decoders would make more pixels than the picture has, and names with formulas."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="Pillow (extra: train)")

from harmonizer_ext.files.images import read_image, read_map
from harmonizer_ext.files.reading import UnreadableError
from harmonizer_ext.files.text import cell


def tiled(path: Path, width: int, height: int) -> Path:
    """A grey TIFF of 16x16 pixels in one tile of zeros, of any size."""
    data = zlib.compress(bytes(width * height))
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: width, 323: height}
    tags |= {324: 8 + 2 + 12 * 10 + 4, 325: len(data)}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())]
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    path.write_bytes(head + b"".join(entries) + bytes(4) + data)
    return path


@pytest.mark.parametrize("read", [read_image, read_map])
@pytest.mark.parametrize("size", [(512, 512), (16, 16384)])
def test_tiles_larger_than_the_picture(tmp_path: Path, read: object, size: tuple[int, int]) -> None:
    assert callable(read)
    assert read(tiled(tmp_path / "small.tif", 16, 16), 3 * 1024).shape[-2:] == (16, 16)
    with pytest.raises(
        UnreadableError, match=rf"tiles of at most 1024 pixels .*{size[0]}x{size[1]}"
    ):
        read(tiled(tmp_path / "large.tif", *size), 3 * 1024)


@pytest.mark.parametrize("separator", [";", "|", "; ", ';"', ";;"])
@pytest.mark.parametrize("formula", ["=1+1", "+1", "-1", "@SUM(1)"])
def test_formulas_behind_other_separators(separator: str, formula: str) -> None:
    made = cell(f"a{separator}{formula}")
    assert made == f"a{separator}'{formula}"
    assert cell("a;b|c") == "a;b|c"
    assert cell(f"a\t{formula}") == f"a\\t{formula}"
