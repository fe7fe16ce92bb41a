"""Reads the headers of AV1 streams, for the sizes and the memory of the frames that a decoder will make of them.

Written from the AV1 bitstream specification, sections 5.3 to 5.9. Knows no files: see `artifacts.avif_files`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# A sequence header has at most 400 bytes; the part of a frame header that is read here has at most 20.
_HEADER_BYTES = 512
# Planes start and end at multiples of this number of pixels in the decoder's memory.
_ALIGNMENT = 128
_SEQUENCE, _FRAMES = 1, (3, 6, 7)  # types of units; the last three start with a frame header


class DamagedStreamError(Exception):
    """A stream or a file ends within one of its fields, or contradicts its specification."""


@dataclass(frozen=True)
class Frame:
    """The largest size that a frame of a stream can have.

    Attributes:
        width: width in pixels.
        height: height in pixels.
        pixel_bytes: bytes of one pixel in the planes of the frame.
        memory_bytes: the most bytes that a decoder takes for the frame, of which it may keep several versions.
    """

    width: int
    height: int
    pixel_bytes: float
    memory_bytes: int


class Fields:
    """Reads the fields of a part of a file in their order, and never past its end."""

    def __init__(self, view: memoryview) -> None:
        self.rest = view

    def take(self, size: int) -> memoryview:
        """Return the next bytes. Raises DamagedStreamError if there are fewer."""
        if size > len(self.rest):
            raise DamagedStreamError
        taken, self.rest = self.rest[:size], self.rest[size:]
        return taken

    def number(self, size: int) -> int:
        """Return the number in the next bytes, the highest byte first."""
        return int.from_bytes(self.take(size))


def frames(stream: memoryview) -> Iterator[Frame | None]:
    """Yield the frame of each unit of a stream, None for units that are no frames. Raises DamagedStreamError."""
    fields, sequence = Fields(stream), None
    while fields.rest:
        head = fields.number(1)
        if head & 4:
            fields.take(1)
        unit = fields.take(_length(fields) if head & 2 else len(fields.rest))
        kind = head >> 3 & 15
        if kind == _SEQUENCE:
            sequence = _sequence(_Bits(unit))
        if kind in _FRAMES:
            if sequence is None:
                raise DamagedStreamError
            width, height = _frame_size(_Bits(unit), sequence)
            memory_bytes = int(_aligned(width) * _aligned(height) * sequence.pixel_bytes * sequence.copies)
            yield Frame(width, height, sequence.pixel_bytes, memory_bytes)
        else:
            yield None


def _length(fields: Fields) -> int:
    """Read a number in 7-bit groups, the lowest first (section 4.10.5)."""
    length = 0
    for shift in range(0, 56, 7):
        group = fields.number(1)
        length |= (group & 127) << shift
        if group < 128:
            return length
    raise DamagedStreamError


def _aligned(side: int) -> int:
    return -(-side // _ALIGNMENT) * _ALIGNMENT


class _Bits:
    """Reads the bits at the start of an AV1 unit in their order, and never past its end."""

    def __init__(self, view: memoryview) -> None:
        self._value, self._left = int.from_bytes(view[:_HEADER_BYTES]), 8 * len(view[:_HEADER_BYTES])

    def number(self, bits: int) -> int:
        self._left -= bits
        if self._left < 0:
            raise DamagedStreamError
        return self._value >> self._left & ((1 << bits) - 1)


@dataclass(frozen=True)
class _Sequence:
    """What an AV1 sequence header says of the frames that follow it.

    Attributes:
        size: largest width and height of a frame.
        largest: the largest width and height that a frame can state for itself, whatever `size` is.
        is_reduced: whether the only frame has a reduced header, which states no size.
        time_bits: number of bits of a presentation time in frame headers.
        id_bits: number of bits of a frame's number in frame headers.
        screen_tools: 0 or 1, or 2 if each frame says so.
        integer_vectors: 0 or 1, or 2 if each frame says so.
        pixel_bytes: bytes of one pixel in the planes of a frame.
        copies: in how many versions a frame may be kept: before it is scaled up, after that, and with film grain.
    """

    size: tuple[int, int]
    largest: tuple[int, int]
    is_reduced: bool
    time_bits: int
    id_bits: int
    screen_tools: int
    integer_vectors: int
    pixel_bytes: float
    copies: int


def _sequence(bits: _Bits) -> _Sequence:
    """Read a sequence header (section 5.5)."""
    read = bits.number
    profile, _, is_reduced = read(3), read(1), read(1)
    time_bits = 0
    if is_reduced:
        read(5)
    else:
        delay_bits, has_model = 0, 0
        if read(1):
            read(64)
            is_regular = read(1)
            if is_regular:
                zeros = 0
                while not read(1):
                    zeros += 1
                read(zeros if zeros < 32 else 0)
            has_model = read(1)
            if has_model:
                delay_bits, _, _, time_bits = read(5) + 1, read(32), read(5), read(5) + 1
                time_bits = 0 if is_regular else time_bits
        has_delays = read(1)
        for _ in range(read(5) + 1):
            read(12)
            if read(5) > 7:
                read(1)
            if has_model and read(1):
                read(2 * delay_bits + 1)
            if has_delays and read(1):
                read(4)
    width_bits, height_bits = read(4) + 1, read(4) + 1
    size = read(width_bits) + 1, read(height_bits) + 1
    id_bits = read(4) + read(3) + 3 if not is_reduced and read(1) else 0
    read(3)
    screen_tools = integer_vectors = 2
    if not is_reduced:
        read(4)
        has_order = read(1)
        read(2 * has_order)
        screen_tools = 2 if read(1) else read(1)
        if screen_tools:
            integer_vectors = 2 if read(1) else read(1)
        read(3 * has_order)
    is_scaled = read(1)
    read(2)
    pixel_bytes = _pixel_bytes(bits, profile)
    return _Sequence(
        size=size,
        largest=(1 << width_bits, 1 << height_bits),
        is_reduced=bool(is_reduced),
        time_bits=time_bits,
        id_bits=id_bits,
        screen_tools=screen_tools,
        integer_vectors=integer_vectors,
        pixel_bytes=pixel_bytes,
        copies=1 + is_scaled + read(1),
    )


def _pixel_bytes(bits: _Bits, profile: int) -> float:
    """Read the colour configuration of a sequence header (section 5.5.2). Returns the bytes that a pixel takes."""
    read = bits.number
    sample_bytes = 1 + read(1)
    is_12_bit = bool(profile >= 2 and sample_bytes == 2 and read(1))
    is_grey = bool(profile != 1 and read(1))
    description = read(24) if read(1) else 0
    if is_grey:
        read(1)
        return sample_bytes
    across = down = 0
    if description != _FULL_COLOURS:
        read(1)
        across = down = 1 - (profile & 1)
        if profile >= 2:
            across = read(1) if is_12_bit else 1
            down = read(1) if is_12_bit and across else 0
        read(2 * (across and down))
    read(1)
    return sample_bytes * (1 + 2 / (1 << across + down))


# Primaries of BT.709, transfer function of sRGB and the identity matrix: each colour has its full resolution.
_FULL_COLOURS = 0x010D00


def _frame_size(bits: _Bits, sequence: _Sequence) -> tuple[int, int]:
    """Read the start of a frame header (section 5.9.2). Returns the largest width and height that its frame can have.

    A frame may state its own size. Decoders do not compare it with the one in the sequence header.
    """
    read = bits.number
    if sequence.is_reduced or read(1):
        return sequence.size
    kind, is_shown = read(2), read(1)
    read(sequence.time_bits if is_shown else 1)
    if kind == 3:
        return sequence.largest
    if not (kind == 0 and is_shown):
        read(1)
    read(1)
    tools = read(1) if sequence.screen_tools == 2 else sequence.screen_tools
    if tools and sequence.integer_vectors == 2:
        read(1)
    read(sequence.id_bits)
    return sequence.largest if read(1) else sequence.size
