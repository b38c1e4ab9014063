"""The launch shapes: pure functions of the sizes, so they are tested without a GPU.

A pass over pairs is bound by memory, so enough bytes must be on their way at once on every multiprocessor. Many pairs
give that by themselves; few pairs are spread over as many programs as there are pairs. A pair is not split over
programs: its loss would be known only in the next launch, which would have to read the rows again for the head's
gradient. One program already has both rows on their way at once (512 threads of 8 loads).
"""

from __future__ import annotations

from dataclasses import dataclass

# Elements of one tile of rows. A program holds the chosen tile, the rejected tile, the head's weight and
# its gradient in registers: 4096 elements over 8 warps are 16 of each per thread.
TILE_ELEMENTS = 4096
# Rows up to this size (16384 columns of 16 bits, 8192 of fp32) stay whole in the registers of one program, 128 of each
# of its 512 threads: delta, the head, and the head's gradient. Centering keeps the rejected row as well.
MAX_ROW_BYTES = 32768
MAX_CENTERED_ROW_BYTES = 16384
# Longer rows are read in blocks of this size, and a second time for the head's gradient. Twice as many take 16 warps,
# whose threads have no more than 128 registers each, and sm_100 then spills.
LONG_ROW_BLOCK_BYTES = 8192
# Elements of a tile for each warp: 16 in each of its threads.
ELEMENTS_PER_WARP = 512
# Two programs for each multiprocessor overlap the loads of one with the reductions of the other. More than 16 warps of
# up to 128 registers a thread do not fit on one.
PROGRAMS_PER_MULTIPROCESSOR = 2
WARPS_PER_MULTIPROCESSOR = 16
# Elements of one tile of a gradient that is only written: 16 of them per thread at 8 warps. Twice as many spill
# registers on sm_80 if H is odd, because every element then has its own address.
WRITTEN_TILE_ELEMENTS = 4096
# 32 warps of stores on each multiprocessor. Each program reads the head once, for all of its tiles.
WRITING_PROGRAMS_PER_MULTIPROCESSOR = 4


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
    def for_pairs(
        cls, num_pairs: int, hidden_size: int, element_size: int, multiprocessors: int, centers: bool = False
    ) -> LaunchShape:
        """For reading pairs of rows: persistent programs, each striding over tiles of `block_rows` pairs.

        Args:
            num_pairs, hidden_size: P >= 1 and H >= 1.
            element_size: bytes of one element of a row.
            multiprocessors: of the device.
            centers: whether the centering term is asked for.
        """
        block_hidden = next_power_of_2(hidden_size)
        if block_hidden * element_size > (MAX_CENTERED_ROW_BYTES if centers else MAX_ROW_BYTES):
            block_hidden = LONG_ROW_BLOCK_BYTES // element_size
        pairs_each = next_power_of_2(cdiv(num_pairs, multiprocessors))
        block_rows = min(max(1, TILE_ELEMENTS // block_hidden), 16, pairs_each)
        num_warps = min(max(block_rows * block_hidden // ELEMENTS_PER_WARP, 1), WARPS_PER_MULTIPROCESSOR)
        programs_each = min(PROGRAMS_PER_MULTIPROCESSOR, WARPS_PER_MULTIPROCESSOR // num_warps)
        num_programs = min(cdiv(num_pairs, block_rows), programs_each * multiprocessors)
        return cls(num_programs, block_rows, block_hidden, num_warps)

    @classmethod
    def for_rows(cls, num_rows: int, hidden_size: int, multiprocessors: int) -> LaunchShape:
        """For writing rows: `num_programs` programs along the rows, striding over tiles, for each block of columns."""
        block_hidden = min(next_power_of_2(hidden_size), 1024)
        while block_hidden > 128 and num_rows * cdiv(hidden_size, block_hidden) < multiprocessors:
            block_hidden //= 2  # few rows are spread by their columns
        column_blocks = cdiv(hidden_size, block_hidden)
        rows_each = next_power_of_2(cdiv(num_rows * column_blocks, multiprocessors))
        block_rows = min(max(1, WRITTEN_TILE_ELEMENTS // block_hidden), 16, rows_each)
        num_warps = min(max(block_rows * block_hidden // ELEMENTS_PER_WARP, 1), 8)
        num_programs = min(
            cdiv(num_rows, block_rows), cdiv(WRITING_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, column_blocks)
        )
        return cls(num_programs, block_rows, block_hidden, num_warps)
