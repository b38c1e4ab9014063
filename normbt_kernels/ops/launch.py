"""The launch shapes: pure functions of the sizes, so they are tested without a GPU.

A pass over pairs is bound by memory: what matters is that enough bytes are on their way at once, on every
multiprocessor. Many pairs give that by themselves; few pairs are spread over as many programs as there are.
"""

from __future__ import annotations

from dataclasses import dataclass

# Elements of one tile of rows. A program holds the chosen tile, the rejected tile, the head's weight and
# its gradient in registers: 4096 elements over 8 warps are 16 of each per thread.
TILE_ELEMENTS = 4096
# Beyond this a row is walked in blocks and read a second time for the head's gradient (from the L2 cache:
# the row pair has just been read), because delta no longer fits the registers of one program.
MAX_BLOCK_BYTES = 16384
# Two programs for each multiprocessor overlap the loads of one with the reductions of the other.
PROGRAMS_PER_MULTIPROCESSOR = 2
# Elements of one tile of a gradient that is only written: 16 of them per thread at 8 warps. Twice as many spill
# registers on sm_80 where H is odd, because every element then has an address of its own.
WRITTEN_TILE_ELEMENTS = 4096
# As many such programs as a multiprocessor holds (8 warps of 64); each reads the head once, for all of its tiles.
WRITING_PROGRAMS_PER_MULTIPROCESSOR = 8


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class LaunchShape:
    """`num_programs` programs over tiles of `block_rows` rows (or pairs of rows) by `block_hidden` columns."""

    num_programs: int
    block_rows: int
    block_hidden: int
    num_warps: int

    @classmethod
    def for_pairs(cls, num_pairs: int, hidden_size: int, element_size: int, multiprocessors: int) -> LaunchShape:
        """For reading pairs of rows: persistent programs, each striding over tiles of `block_rows` pairs.

        Args:
            num_pairs, hidden_size: P >= 1 and H >= 1.
            element_size: bytes of one element of a row.
            multiprocessors: of the device.
        """
        block_hidden = min(next_power_of_2(hidden_size), MAX_BLOCK_BYTES // element_size)
        pairs_each = next_power_of_2(cdiv(num_pairs, multiprocessors))
        block_rows = min(max(1, TILE_ELEMENTS // block_hidden), 16, pairs_each)
        num_warps = min(max(block_rows * block_hidden // 512, 1), 16)
        num_programs = min(cdiv(num_pairs, block_rows), PROGRAMS_PER_MULTIPROCESSOR * multiprocessors)
        return cls(num_programs, block_rows, block_hidden, num_warps)

    @classmethod
    def for_rows(cls, num_rows: int, hidden_size: int, multiprocessors: int) -> LaunchShape:
        """For writing rows: `num_programs` programs along the rows, striding over tiles, for each block of columns."""
        block_hidden = min(next_power_of_2(hidden_size), 1024)
        column_blocks = cdiv(hidden_size, block_hidden)
        rows_each = next_power_of_2(cdiv(num_rows * column_blocks, multiprocessors))
        block_rows = min(max(1, WRITTEN_TILE_ELEMENTS // block_hidden), 16, rows_each)
        num_warps = min(max(block_rows * block_hidden // 512, 1), 8)
        num_programs = min(
            cdiv(num_rows, block_rows), cdiv(WRITING_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, column_blocks)
        )
        return cls(num_programs, block_rows, block_hidden, num_warps)
