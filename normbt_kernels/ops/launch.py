"""The launch shapes: pure functions of the sizes, so they are tested without a GPU."""

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


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class LaunchShape:
    """`num_programs` programs, each striding over blocks of `block_pairs` pairs, `block_hidden` columns at a time."""

    num_programs: int
    block_pairs: int
    block_hidden: int
    num_warps: int

    @classmethod
    def for_pairs(cls, num_pairs: int, hidden_size: int, element_size: int, multiprocessors: int) -> LaunchShape:
        """The shape for `num_pairs` pairs of rows of `hidden_size` elements of `element_size` bytes."""
        block_hidden = min(next_power_of_2(hidden_size), MAX_BLOCK_BYTES // element_size)
        block_pairs = min(max(1, TILE_ELEMENTS // block_hidden), 16, next_power_of_2(num_pairs))
        num_warps = min(max(block_pairs * block_hidden // 512, 1), 16)
        num_programs = min(cdiv(num_pairs, block_pairs), PROGRAMS_PER_MULTIPROCESSOR * multiprocessors)
        return cls(num_programs, block_pairs, block_hidden, num_warps)

    @classmethod
    def for_rows(cls, num_rows: int, hidden_size: int) -> LaunchShape:
        """The shape for writing `num_rows` rows of a rank-one gradient: one program per tile, no striding."""
        block_hidden = min(next_power_of_2(hidden_size), 1024)
        block_rows = min(max(1, 8192 // block_hidden), 16, next_power_of_2(num_rows))
        num_warps = min(max(block_rows * block_hidden // 1024, 1), 8)
        return cls(cdiv(num_rows, block_rows), block_rows, block_hidden, num_warps)
