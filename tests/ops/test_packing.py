"""pack_bits and unpack_bits: the bytes of the reference and by hand, at every width and size."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adaround_ext import reference
from adaround_ext.ops import pack_bits, unpack_bits
from tests.emulation import EMULATED
from tests.support.helpers import (
    ARGUMENT_ERROR,
    has_cuda_kernels,
    instruction_set,  # noqa: F401  a fixture
    strided,
    threads,
    transposed,
    unaligned,
)

pytestmark = pytest.mark.usefixtures("one_thread")
each_instruction_set = pytest.mark.usefixtures("instruction_set")

BITS = range(1, 9)
# Around a block of 8 codes, around the vectors of every instruction set, two tasks and a rest.
COLS = [1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 136, 200, 1027]


def first_code(bits: int, signed: bool) -> int:
    return -(2 ** (bits - 1)) if signed else 0


def make_codes(device: torch.device, rows: int, cols: int, bits: int, qmin: int) -> Tensor:
    codes = torch.randint(qmin, qmin + 2**bits, (rows, cols))
    return codes.to(device, _dtype(qmin))


def _dtype(qmin: int) -> torch.dtype:
    return torch.int8 if qmin < 0 else torch.uint8


def check(codes: Tensor, bits: int, qmin: int) -> None:
    """The reference's bytes, and the codes back."""
    packed = pack_bits(codes, bits, qmin)
    assert packed.is_contiguous()
    assert torch.equal(packed, reference.pack_bits(codes, bits, qmin))
    back = unpack_bits(packed, bits, codes.shape[1], qmin)
    assert back.dtype == codes.dtype
    assert torch.equal(back, codes)


@each_instruction_set
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("bits", BITS)
def test_sizes(device: torch.device, bits: int, signed: bool) -> None:
    qmin = first_code(bits, signed)
    for cols in COLS:
        check(make_codes(device, 3, cols, bits, qmin), bits, qmin)


@each_instruction_set
@pytest.mark.parametrize("bits", BITS)
def test_one_long_row(device: torch.device, bits: int) -> None:
    qmin = first_code(bits, signed=True)
    check(make_codes(device, 1, 3 * 16384 + 5, bits, qmin), bits, qmin)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "cols"), [(0, 5), (3, 0), (0, 0)])
def test_empty(device: torch.device, rows: int, cols: int, bits: int) -> None:
    codes = torch.zeros(rows, cols, dtype=torch.uint8, device=device)
    packed = pack_bits(codes, bits, 0)
    assert packed.shape == (rows, -(-cols * bits // 8))
    assert unpack_bits(packed, bits, cols, 0).shape == (rows, cols)


# Written out by hand: bits of a byte from the last to the first, codes as numbers code - qmin.
BY_HAND = [
    # 4 bits, from -8: 0, 15, 8, 1 and half a byte.
    pytest.param([-8, 7, 0, -7, -3], 4, -8, [0b1111_0000, 0b0001_1000, 0b0000_0101], id="4"),
    # 3 bits, from 0: the third code, 101, has two bits in the first byte and one in the second; the
    # sixth, 110, has one in the second byte and two in the third; 2 bits are left.
    pytest.param(
        [1, 2, 5, 7, 0, 6, 3, 4, 7],
        3,
        0,
        [0b01_010_001, 0b0_000_111_1, 0b100_011_11, 0b00000_111],
        id="3",
    ),
    # 5 bits, from -16: 1, 31, 16.
    pytest.param([-15, 15, 0], 5, -16, [0b111_00001, 0b0_10000_11], id="5"),
    # 7 bits, from 0: 127, 0, 64: the third begins in the second byte's last two bits.
    pytest.param([127, 0, 64], 7, 0, [0b0_1111111, 0b00_000000, 0b000_10000], id="7"),
    pytest.param([1, 0, 1, 1, 0, 0, 0, 1, 1], 1, 0, [0b1000_1101, 0b1], id="1"),
    pytest.param([-2, -1, 0, 1], 2, -2, [0b11_10_01_00], id="2"),
    pytest.param([-128, 127, 0], 8, -128, [0, 255, 128], id="8"),
    # A grid that does not begin at 0 nor at the least code of its sign.
    pytest.param([100, 103, 102], 2, 100, [0b00_10_11_00], id="2-from-100"),
    pytest.param([-100, -97, -98], 2, -100, [0b00_10_11_00], id="2-from--100"),
]


@each_instruction_set
@pytest.mark.parametrize(("codes", "bits", "qmin", "packed"), BY_HAND)
def test_by_hand(
    device: torch.device, codes: list[int], bits: int, qmin: int, packed: list[int]
) -> None:
    dtype = torch.int8 if qmin < 0 else torch.uint8
    given_codes = torch.tensor([codes], dtype=dtype, device=device)
    assert pack_bits(given_codes, bits, qmin).tolist() == [packed]
    given_packed = torch.tensor([packed], dtype=torch.uint8, device=device)
    assert unpack_bits(given_packed, bits, len(codes), qmin).tolist() == [codes]


@given(data=st.data(), bits=st.integers(1, 8), signed=st.booleans())
@settings(max_examples=60, deadline=None)
def test_round_trip_of_any_codes(data: st.DataObject, bits: int, signed: bool) -> None:
    lowest, highest = (-128, 127) if signed else (0, 255)
    last = highest - 2**bits + 1
    qmin = data.draw(st.integers(lowest, min(last, -1) if signed else last))
    rows, cols = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 90))
    codes = st.integers(qmin, qmin + 2**bits - 1)
    drawn = data.draw(st.lists(codes, min_size=rows * cols, max_size=rows * cols))
    check(torch.tensor(drawn, dtype=_dtype(qmin)).view(rows, cols), bits, qmin)


@each_instruction_set
@pytest.mark.parametrize("layout", [unaligned, transposed, strided])
@pytest.mark.parametrize("bits", BITS)
def test_layouts(device: torch.device, bits: int, layout: object) -> None:
    qmin = first_code(bits, signed=True)
    codes = make_codes(device, 5, 264, bits, qmin)
    packed = pack_bits(codes, bits, qmin)
    assert torch.equal(pack_bits(layout(codes), bits, qmin), packed)
    assert torch.equal(unpack_bits(layout(packed), bits, 264, qmin), codes)


@each_instruction_set
@pytest.mark.parametrize("bits", BITS)
def test_what_follows_a_row_is_not_looked_at(device: torch.device, bits: int) -> None:
    cols = 299  # leaves bits of the last byte at every width but 8
    qmin = first_code(bits, signed=False)
    codes = make_codes(device, 2, cols, bits, qmin)
    packed = pack_bits(codes, bits, qmin)
    packed[:, -1] |= 0xFF << (cols * bits % 8 or 8) & 0xFF
    followed = torch.cat([packed, torch.full_like(packed, 255)])[:2]
    assert torch.equal(unpack_bits(followed, bits, cols, qmin), codes)


@pytest.mark.parametrize("shape", [(1, 200_003), (300, 129)])
@pytest.mark.parametrize("bits", BITS)
def test_same_bits_for_any_number_of_threads(bits: int, shape: tuple[int, int]) -> None:
    qmin = first_code(bits, signed=True)
    codes = make_codes(torch.device("cpu"), *shape, bits, qmin)
    with threads(1):
        one = pack_bits(codes, bits, qmin)
    with threads(2):
        two = pack_bits(codes, bits, qmin)
        back = unpack_bits(two, bits, shape[1], qmin)
    assert torch.equal(one, two)
    assert torch.equal(back, codes)


@each_instruction_set
@pytest.mark.parametrize("at", [(0, 0), (1, 130), (2, 136)])
@pytest.mark.parametrize("bits", BITS[:7])
def test_codes_that_do_not_fit(device: torch.device, bits: int, at: tuple[int, int]) -> None:
    for signed in (True, False):
        qmin = first_code(bits, signed)
        codes = make_codes(device, 3, 137, bits, qmin)
        fits = pack_bits(codes, bits, qmin)
        too_large = codes.clone()
        too_large[at] = qmin + 2**bits
        if has_cuda_kernels(device):  # masked: 2^bits becomes 0
            codes[at] = qmin
            assert torch.equal(pack_bits(too_large, bits, qmin), pack_bits(codes, bits, qmin))
            continue
        text = f"codes must lie within [{qmin}, {qmin + 2**bits - 1}], got 1 of 411 outside"
        with pytest.raises(ARGUMENT_ERROR, match=re.escape(text)):
            pack_bits(too_large, bits, qmin)
        if signed:
            too_small = codes.clone()
            too_small[at] = qmin - 1
            with pytest.raises(ARGUMENT_ERROR, match=re.escape(text)):
                pack_bits(too_small, bits, qmin)
        assert torch.equal(pack_bits(codes, bits, qmin), fits)


@pytest.mark.skipif(EMULATED, reason="codes are counted on the CPU only")
def test_all_codes_outside_are_counted() -> None:
    codes = torch.tensor([[-128, -9, -8, 7, 8, 127]], dtype=torch.int8)
    with pytest.raises(ARGUMENT_ERROR, match=r"within \[-8, 7\], got 4 of 6 outside"):
        pack_bits(codes, 4, -8)


CODES = torch.zeros(2, 6, dtype=torch.int8)
PACKED = torch.zeros(2, 3, dtype=torch.uint8)
ERRORS = [
    (pack_bits, (CODES, 0, -8), "bits must be from 1 to 8, got 0"),
    (pack_bits, (CODES, 9, -8), "bits must be from 1 to 8, got 9"),
    (
        pack_bits,
        (CODES, 4, -129),
        "qmin must leave 4 bits within [-128, 127] or [0, 255], got -129",
    ),
    (pack_bits, (CODES, 8, -1), "qmin must leave 8 bits within [-128, 127] or [0, 255], got -1"),
    (pack_bits, (CODES, 4, 241), "qmin must leave 4 bits within [-128, 127] or [0, 255], got 241"),
    (pack_bits, (CODES, 4, 0), "codes must have dtype Byte, got Char"),
    (pack_bits, (CODES.to(torch.uint8), 4, -8), "codes must have dtype Char, got Byte"),
    (pack_bits, (CODES.int(), 4, -8), "codes must have dtype Char, got Int"),
    (pack_bits, (CODES[0], 4, -8), "codes must be a matrix [rows, cols], got shape [6]"),
    (unpack_bits, (PACKED, 0, 6, -8), "bits must be from 1 to 8, got 0"),
    (unpack_bits, (PACKED, 4, 6, 250), "qmin must leave 4 bits within"),
    (unpack_bits, (PACKED, 4, -1, -8), "cols must not be negative, got -1"),
    (unpack_bits, (PACKED.to(torch.int8), 4, 6, -8), "packed must have dtype Byte, got Char"),
    (
        unpack_bits,
        (PACKED, 4, 7, -8),
        "packed must have shape [rows, 4] for 7 columns of 4 bits, got [2, 3]",
    ),
    (unpack_bits, (PACKED[0], 4, 6, -8), "packed must have shape [rows, 3] for 6 columns"),
    (
        unpack_bits,
        (PACKED, 8, 2**63 - 1, -128),
        "packed must have shape [rows, 9223372036854775807] for 9223372036854775807 columns",
    ),
]


@pytest.mark.parametrize(("op", "arguments", "message"), ERRORS)
def test_message(
    device: torch.device, op: object, arguments: tuple[Tensor, int, int], message: str
) -> None:
    with pytest.raises(ARGUMENT_ERROR, match=re.escape(message)):
        op(arguments[0].to(device), *arguments[1:])


@pytest.mark.parametrize("bits", [3, 4])
def test_opcheck(device: torch.device, bits: int) -> None:
    qmin = first_code(bits, signed=True)
    codes = make_codes(device, 3, 11, bits, qmin)
    ops = torch.ops.adaround_ext
    torch.library.opcheck(ops.pack_bits.default, (transposed(codes), bits, qmin))
    packed = pack_bits(codes, bits, qmin)
    torch.library.opcheck(ops.unpack_bits.default, (packed, bits, 11, qmin))


def test_compiled(device: torch.device) -> None:
    qmin = -4
    codes = make_codes(device, 3, 11, 3, qmin)

    def there_and_back(codes: Tensor) -> tuple[Tensor, Tensor]:
        packed = pack_bits(codes, 3, qmin)
        return packed, unpack_bits(packed, 3, codes.shape[1], qmin)

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(codes), there_and_back(codes), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", [(), (4,), (2, 4, 4)])
def test_fake_kernels_refuse_what_is_no_matrix(shape: tuple[int, ...]) -> None:
    packed = torch.empty(shape, dtype=torch.uint8, device="meta")
    with pytest.raises(RuntimeError, match="packed must be a matrix, got shape"):
        unpack_bits(packed, 4, 8, 0)
    with pytest.raises(RuntimeError, match="codes must be a matrix, got shape"):
        pack_bits(packed, 4, 0)
