"""The launch shapes: pure functions of the sizes and the device, so they are tested without a GPU.

A pass over pairs is bound by memory, so enough bytes must be on their way at once on every multiprocessor. With many
pairs a program asks for its next tiles before it has reduced this one, if shared memory can hold them, and has few
warps of many elements each: less is added up between warps. Few pairs are spread over as many programs as there are
pairs. A pair is not split over programs: its loss would be known only in the next launch, which would have to read the
rows again for the head's gradient. One program already has both rows on their way at once.

AHEAD, AHEAD_WITHOUT_HEAD and the written tile were measured on an H200 (bench/NOTES.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Processors(NamedTuple):
    """The multiprocessors of a device."""

    count: int
    shared_bytes: int  # of each, for tiles on their way; 0 where kernels are not to ask for them beforehand


class Reading(NamedTuple):
    """How a pass reads many pairs of rows that one program can hold."""

    tile_bytes: int  # of one side
    register_bytes: int  # of one side's tile, in each thread; the head and its gradient take as many again
    warps_per_multiprocessor: int
    stages: int  # tiles of a program that are in hand or on their way


AHEAD = Reading(16384, 256, 8, 3)
# Given rewards, there are registers for more programs, and no partial sums to write.
AHEAD_WITHOUT_HEAD = Reading(16384, 256, 12, 3)
# Where shared memory cannot hold the tiles to come: the loads of one program overlap the reductions of others.
AT_ONCE = Reading(8192, 128, 16, 1)
BY_ELEMENTS = Reading(8192, 64, 16, 1)  # rows that are not copied in pieces: every element has its own address
CENTERED_REGISTER_BYTES = 128  # centering keeps the rejected rows as well
MAX_ROWS = 16  # of a tile
# Of a row, for each warp. With half as many, twice the warps add up each row: at H=1024 in bf16 394 us instead of 265.
WARP_BYTES = 1024
WARPS_OF_A_TILE = 4  # at most, or as many as it takes to hold a row
SCRATCH_BYTES = 2048  # of shared memory, for each program beside its tiles
# Rows up to this size (16384 columns of 16 bits, 8192 of fp32) stay whole in the registers of one program.
MAX_ROW_BYTES = 32768
MAX_CENTERED_ROW_BYTES = 16384
# Longer rows are read in blocks of this size, and a second time for the head's gradient. Twice as many take 16 warps,
# whose threads have no more than 128 registers each, and sm_100 then spills.
LONG_ROW_BLOCK_BYTES = 8192
FEW_PAIRS_PER_MULTIPROCESSOR = 2  # up to as many, each pair has a program of its own
# Of the row, or of the block of a long one, of such a program.
ELEMENTS_PER_WARP = 512
MAX_WARPS = 16  # of one program
# Elements of one tile of a gradient that is only written: 32 of them in each thread of 8 warps.
WRITTEN_TILE_ELEMENTS = 8192
WRITTEN_ELEMENTS_PER_WARP = 1024
# Each program reads the head once for this many tiles, which lie one behind the other.
TILES_OF_A_PROGRAM = 4
WRITING_PROGRAMS_PER_MULTIPROCESSOR = 4  # at the least, where there are as many tiles


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def previous_power_of_2(n: int) -> int:
    return 1 << (n.bit_length() - 1)


@dataclass(frozen=True)
class LaunchShape:
    """`num_programs` programs over tiles of `block_rows` rows (or pairs of rows) by `block_hidden` columns, of which
    `num_stages` are in hand or on their way at once."""

    num_programs: int
    block_rows: int
    block_hidden: int
    num_warps: int
    num_stages: int = 1

    @classmethod
    def for_pairs(
        cls,
        num_pairs: int,
        hidden_size: int,
        element_size: int,
        processors: Processors,
        accumulated_size: int = 4,
        copied: bool = True,
        centers: bool = False,
        head: bool = True,
    ) -> LaunchShape:
        """For reading pairs of rows: persistent programs, each striding over tiles of `block_rows` pairs.

        Args:
            num_pairs, hidden_size: P >= 1 and H >= 1.
            element_size: bytes of one element of a row.
            processors: of the device.
            accumulated_size: bytes of an element in registers.
            copied: whether rows come in pieces of 16 bytes, as copies to shared memory do.
            centers: whether the centering term is asked for.
            head: whether the pass holds a head, and sums its gradient.
        """
        block_hidden = next_power_of_2(hidden_size)
        row_bytes = block_hidden * element_size
        is_long = row_bytes > (MAX_CENTERED_ROW_BYTES if centers else MAX_ROW_BYTES)
        if is_long or num_pairs <= FEW_PAIRS_PER_MULTIPROCESSOR * processors.count:
            block_hidden = LONG_ROW_BLOCK_BYTES // element_size if is_long else block_hidden
            num_warps = min(max(block_hidden // ELEMENTS_PER_WARP, 1), MAX_WARPS)
            programs_each = min(MAX_WARPS // num_warps, FEW_PAIRS_PER_MULTIPROCESSOR)
            return cls(min(num_pairs, programs_each * processors.count), 1, block_hidden, num_warps)

        ahead = AHEAD if head else AHEAD_WITHOUT_HEAD
        for reading in (ahead, AT_ONCE) if copied else (BY_ELEMENTS,):
            register_bytes = reading.register_bytes
            if centers:
                register_bytes = min(register_bytes, CENTERED_REGISTER_BYTES)
            elements_per_warp = 32 * register_bytes // accumulated_size
            num_warps = max(min(row_bytes // WARP_BYTES, WARPS_OF_A_TILE), block_hidden // elements_per_warp, 1)
            num_warps = min(num_warps, MAX_WARPS)
            held = min(reading.tile_bytes // row_bytes, elements_per_warp * num_warps // block_hidden, MAX_ROWS)
            block_rows = previous_power_of_2(max(min(held, num_pairs // processors.count), 1))
            programs_each = max(reading.warps_per_multiprocessor // num_warps, 1)
            if reading.stages > 1:
                program_bytes = 2 * (reading.stages - 1) * block_rows * row_bytes + SCRATCH_BYTES
                programs_each = min(programs_each, processors.shared_bytes // program_bytes)
            if programs_each > 0:
                break
        num_programs = min(cdiv(num_pairs, block_rows), programs_each * processors.count)
        return cls(num_programs, block_rows, block_hidden, num_warps, reading.stages)

    @classmethod
    def for_rows(cls, num_rows: int, hidden_size: int, multiprocessors: int) -> LaunchShape:
        """For writing rows: `num_programs` programs, each of a few tiles one below the other, for each block of
        columns."""
        block_hidden = min(next_power_of_2(hidden_size), 1024)
        while block_hidden > 128 and num_rows * cdiv(hidden_size, block_hidden) < multiprocessors:
            block_hidden //= 2  # few rows are spread by their columns
        column_blocks = cdiv(hidden_size, block_hidden)
        rows_each = next_power_of_2(cdiv(num_rows * column_blocks, multiprocessors))
        block_rows = min(max(1, WRITTEN_TILE_ELEMENTS // block_hidden), MAX_ROWS, rows_each)
        num_warps = min(max(block_rows * block_hidden // WRITTEN_ELEMENTS_PER_WARP, 1), 8)
        num_tiles = cdiv(num_rows, block_rows)
        tiles_each = num_tiles * column_blocks // (WRITING_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors)
        tiles_each = min(max(tiles_each, 1), TILES_OF_A_PROGRAM)
        return cls(max(cdiv(num_tiles, tiles_each), 1), block_rows, block_hidden, num_warps)
