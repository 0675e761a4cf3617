"""Reads TensorFlow's checkpoints of version 2 ("tensor bundles") without TensorFlow.

`PREFIX.index` is a table in LevelDB's format (its doc/table_format.md): blocks of sorted keys with
shared prefixes, an index block of where they lie, a footer.  Values are protocol buffers of
tensorflow/core/protobuf/tensor_bundle.proto: under the empty key a header, under each variable's
name where its bytes lie in `PREFIX.data-0000i-of-0000n`.  Every block and tensor carries a CRC-32C.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from basics.console import UserError

MAGIC = 0xDB4775248B80FB57
_FOOTER, _TRAILER = 48, 5  # bytes; a block's trailer: one byte of compression, four of checksum
_LARGEST_INDEX = 1 << 26  # bytes; those of SimCLRv2 have some thousands
DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}  # tensorflow/core/framework/types.proto


class Entry(NamedTuple):
    """Where a variable lies: shape, the number of its dtype, shard, byte offset and size, masked CRC-32C."""

    shape: tuple
    dtype: int
    shard: int
    offset: int
    size: int
    checksum: int


class Bundle:
    """An open checkpoint.

    Attributes:
        entries: `{name: Entry}` of every variable, in the order of the names.
    """

    def __init__(self, prefix):
        """Reads the index of `PREFIX.index`.

        Raises:
            UserError: it is missing, damaged, or uses what this reader does not know (compression, big-endian).
        """
        self.prefix = str(prefix)
        try:
            rows = dict(_table(_index(Path(f"{prefix}.index"))))
            header = _message(rows.pop(b""))
            self.entries = {name.decode(): _entry(_message(value)) for name, value in rows.items()}
        except OSError as error:
            reason = f"cannot read the TensorFlow checkpoint {prefix}.index: {error.strerror}"
            raise UserError(f"{reason}; check the path") from error
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{prefix}.index is no checkpoint index or is damaged ({error}); copy it again") from error
        if header.get(2, [0])[0]:
            raise UserError(f"{prefix}.index is of a big-endian machine, which is not supported")
        self.shards = header.get(1, [1])[0]
        if not isinstance(self.shards, int) or not 1 <= self.shards < 1 << 16:
            raise UserError(f"{prefix}.index is damaged (its number of shards); copy it again")

    def read(self, name):
        """The variable `name` as an array, checked against its checksum.

        Raises:
            UserError: its file is missing, truncated or damaged, or its type or layout is not supported.
        """
        entry = self.entries[name]
        path = Path(f"{self.prefix}.data-{entry.shard:05d}-of-{self.shards:05d}")
        dtype = np.dtype(DTYPES.get(entry.dtype, "V0"))
        expected = dtype.itemsize * math.prod(entry.shape)
        if not entry.size or entry.size != expected:  # the whole of a partitioned variable has no size
            raise UserError(f"{path}: {name} is partitioned or of a type that is not supported (number {entry.dtype})")
        try:
            fits = entry.offset + entry.size <= path.stat().st_size  # a false size would be made room for
            with path.open("rb") as file:
                file.seek(entry.offset if fits else 0)
                data = file.read(entry.size if fits else 0)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; it belongs to {self.prefix}.index") from error
        if len(data) != entry.size or _masked(crc32c(data)) != entry.checksum:
            raise UserError(f"{path} is truncated or damaged (at {name}); copy it again")
        return np.frombuffer(data, dtype).reshape(entry.shape)


def _index(path):
    """The bytes of an index file."""
    if path.stat().st_size > _LARGEST_INDEX:
        raise ValueError(f"it has more than {_LARGEST_INDEX:,} bytes")
    return path.read_bytes()


def _table(data):
    """Yields (key, value) of every entry of a table's bytes."""
    if len(data) < _FOOTER or int.from_bytes(data[-8:], "little") != MAGIC:
        raise ValueError("its last bytes are not a table's")
    _, _, at = _handle(data, len(data) - _FOOTER)  # the metaindex, which checkpoints leave empty
    offset, size, _ = _handle(data, at)
    end = 0
    for _, handle in _block(data, offset, size):
        offset, size, _ = _handle(handle, 0)
        if offset < end:
            raise ValueError("its blocks overlap")
        end = offset + size
        yield from _block(data, offset, size)


def _block(data, offset, size):
    """Yields (key, value) of a block: each key says how many bytes it shares with the one before."""
    block, end = data[offset : offset + size], offset + size
    if len(data) < end + _TRAILER or _masked(crc32c(data[offset : end + 1])) != _fixed32(data, end + 1):
        raise ValueError("a checksum differs")
    if data[end]:
        raise ValueError("it is compressed; TensorFlow writes checkpoints uncompressed")
    at, end = 0, size - 4 * (1 + _fixed32(block, size - 4))  # restart points and their number follow the entries
    key = b""
    while at < end:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + own]
        at += own + length
        yield key, block[at - length : at]


def _handle(data, at):
    """(offset, size, position after them) of a block handle at `at`."""
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return offset, size, at


def _fixed32(data, at):
    return int.from_bytes(data[at : at + 4], "little")


def _varint(data, at):
    """(number, position after it): seven bits a byte, lowest first, the eighth set where more follow."""
    end = at
    while data[end] > 127:
        end += 1
        if end - at > 9:
            raise ValueError("a number has more than ten bytes")
    return sum((byte & 127) << 7 * k for k, byte in enumerate(data[at : end + 1])), end + 1


def _message(data):
    """A protocol buffer's fields: `{number: [values in order]}`, numbers as int and the rest as bytes."""
    fields, at = {}, 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind == 2:
            length, at = _varint(data, at)
            value, at = data[at : at + length], at + length
        elif kind == 5:
            value, at = _fixed32(data, at), at + 4
        else:
            raise ValueError(f"unknown wire type {kind}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _entry(fields):
    """The `Entry` of a BundleEntryProto; fields of value zero are left out of the file."""
    first = lambda number, default=0: fields.get(number, [default])[0]
    dims = _message(first(2, b"")).get(2, [])  # TensorShapeProto.dim
    shape = tuple(_message(dim).get(1, [0])[0] for dim in dims)
    entry = Entry(shape, first(1), first(3), first(4), first(5), first(6))
    if len(shape) > 8 or not all(isinstance(value, int) for value in (*shape, *entry[1:])):
        raise ValueError("a variable has more than eight axes, or text where numbers belong")
    return entry


def crc32c(data):
    """CRC-32C (Castagnoli, RFC 3720) of at least four bytes.

    The register is linear in the bytes: pieces of equal length are run side by side from zero, then joined in pairs,
    the left one moved past the right one's length.
    """
    bits = len(data).bit_length()
    padded = np.zeros(1 << bits, np.uint8)  # zeros in front do not change a register of zero
    padded[-len(data) :] = np.frombuffer(data, np.uint8)
    padded[-len(data) :][:4] ^= 255  # the same as starting from all ones
    columns = np.ascontiguousarray(padded.reshape(-1, 1 << bits // 2).T)  # a piece is a column
    registers, move = np.zeros(columns.shape[1], np.uint32), _ONE_BYTE
    for column in columns:
        registers = _moved(registers ^ column, _ONE_BYTE)
    for _ in range(bits // 2):
        move = _moved(move, move)  # twice the distance
    while len(registers) > 1:
        registers = _moved(registers[::2], move) ^ registers[1::2]
        move = _moved(move, move)
    return int(~registers[0])


def _moved(registers, move):
    """Registers moved over zero bytes, so many as `move` (4, 256) tells of each of a register's bytes."""
    low, second, third, high = (registers >> np.uint32(8 * k) & 255 for k in range(4))
    return move[0, low] ^ move[1, second] ^ move[2, third] ^ move[3, high]


def _over_one_byte():
    """`_moved`'s table for one byte."""
    table = np.arange(256, dtype=np.uint32) << 8 * np.arange(4, dtype=np.uint32)[:, None]
    for _ in range(8):
        table = table >> 1 ^ (table & 1) * np.uint32(0x82F63B78)
    return table


_ONE_BYTE = _over_one_byte()


def _masked(checksum):
    """As stored: TensorFlow's core/lib/hash/crc32c.h."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
