"""The TFRecord reader against files of an independent writer, and against TensorFlow's messages."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import released
import torch
from clickme_shards import crc32c, delimited, example, framed, varint

from harmonizer_ext.clickme import tfrecord

pytest.importorskip("google_crc32c", reason="google-crc32c (extra: train) checks the records")


def test_the_writers_checksum() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the polynomial's published check value


def test_records_are_found_and_read(tmp_path: Path) -> None:
    contents = [b"", b"a", bytes(range(256)) * 5]
    path = tmp_path / "any.tfrecords"
    path.write_bytes(b"".join(framed(data) for data in contents))
    offsets = tfrecord.index_records(path)
    assert offsets.tolist() == [0, 16, 33]
    assert offsets.dtype == torch.int64
    assert [tfrecord.read_record(path, int(offset)) for offset in offsets] == contents


def test_example_with_every_kind_of_feature() -> None:
    integers = [0, 1, -1, 127, 128, 2**63 - 1, -(2**63)]
    packed = delimited(3, delimited(1, b"".join(varint(value) for value in integers)))
    single = delimited(3, b"".join(varint(8) + varint(value) for value in integers))
    floats = [0.0, -1.5, 3.0e38]
    packed_floats = delimited(2, delimited(1, struct.pack("<3f", *floats)))
    single_floats = delimited(2, b"".join(b"\x0d" + struct.pack("<f", x) for x in floats))
    texts = delimited(1, delimited(1, b"x") + delimited(1, b""))
    unknown = (
        varint(7 * 8) + varint(300) + varint(8 * 8 + 5) + b"1234" + varint(9 * 8 + 1) + bytes(8)
    )
    features = {
        "packed": packed,
        "single": single,
        "packed floats": packed_floats,
        "single floats": single_floats,
        "texts": texts,
        "née": b"",
        "unknown": unknown + texts,
    }
    entries = b"".join(
        delimited(1, unknown + delimited(1, name.encode()) + delimited(2, feature))
        for name, feature in features.items()
    )
    parsed = tfrecord.parse_example(unknown + delimited(1, entries) + unknown)
    float32 = np.array(floats, np.float32).tolist()
    assert parsed == {
        "packed": integers,
        "single": integers,
        "packed floats": float32,
        "single floats": float32,
        "texts": [b"x", b""],
        "née": [],
        "unknown": [b"x", b""],
    }


def features_of(feature: bytes, name: bytes = b"f") -> bytes:
    return delimited(1, delimited(1, delimited(1, name) + delimited(2, feature)))


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"\x0a\x05\x0a", "a field of 5 bytes at byte 2 of 3"),
        (b"\x0a", "ends within an integer"),
        (b"\xff" * 11, "an integer of more than ten bytes"),
        (b"\x0b\x00", "wire type 3"),
        (b"\x08\x01", "an integer where a message"),
        (features_of(delimited(2, delimited(1, b"12345"))), "5 bytes where floats of four"),
        (features_of(b"", name=b"\xff"), "can't decode byte 0xff"),
    ],
)
def test_malformed_messages(message: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        tfrecord.parse_example(message)


def test_examples_equal_tensorflows_writer() -> None:
    reason = released.why_not()
    if reason is not None:
        pytest.skip(reason)
    tf = released.load().tensorflow
    rng = np.random.default_rng(8)
    integers = rng.integers(-(2**62), 2**62, 50).tolist()
    floats = rng.standard_normal(50).astype(np.float32).tolist()
    features = {
        "i": tf.train.Feature(int64_list=tf.train.Int64List(value=integers)),
        "f": tf.train.Feature(float_list=tf.train.FloatList(value=floats)),
        "b": tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"", b"\x00" * 300])),
        "none": tf.train.Feature(),
    }
    message = tf.train.Example(features=tf.train.Features(feature=features))
    assert tfrecord.parse_example(message.SerializeToString()) == {
        "i": integers,
        "f": floats,
        "b": [b"", b"\x00" * 300],
        "none": [],
    }


def test_written_records_equal_the_independent_writers(tmp_path: Path) -> None:
    path = tmp_path / "written.tfrecords"
    examples: list[dict[str, bytes | int]] = [
        {},
        {"image": b"\x00" * 300, "label": 7, "née": b""},
        {"a": -1, "b": 0, "c": 2**63 - 1, "d": -(2**63), "e": 127, "f": 128},
    ]
    assert tfrecord.write_records(path, iter(examples)) == 3
    assert path.read_bytes() == b"".join(framed(example(**features)) for features in examples)
    assert list(tmp_path.iterdir()) == [path]


def test_written_lists_are_read(tmp_path: Path) -> None:
    path = tmp_path / "lists.tfrecords"
    tfrecord.write_records(path, [{"texts": [b"x", b"", b"y"], "numbers": (3, -4, 5)}])
    assert tfrecord.parse_example(tfrecord.read_record(path, 0)) == {
        "texts": [b"x", b"", b"y"],
        "numbers": [3, -4, 5],
    }


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "kept.tfrecords"
    path.write_bytes(b"old")
    with pytest.raises(TypeError, match="feature 'weight' must be bytes or integers, got float"):
        tfrecord.write_records(path, [{"label": 1}, {"weight": [0.5]}])  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="got bytes, int"):
        tfrecord.write_records(path, [{"mixed": [1, b"1"]}])  # type: ignore[dict-item]
    with pytest.raises(OverflowError):
        tfrecord.write_records(path, [{"label": 2**63}])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
