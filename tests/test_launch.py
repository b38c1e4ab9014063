"""The launch shapes are right, which needs no GPU to be seen."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normbt_kernels.ops.launch import (
    LONG_ROW_BLOCK_BYTES,
    MAX_CENTERED_ROW_BYTES,
    MAX_ROW_BYTES,
    MAX_WARPS,
    SCRATCH_BYTES,
    LaunchShape,
    Processors,
    cdiv,
)

sizes = st.integers(1, 1 << 20)
hidden_sizes = st.integers(1, 32768)
element_sizes = st.sampled_from([2, 4, 8])
multiprocessors = st.sampled_from([3, 108, 132, 304])
processors = st.builds(Processors, multiprocessors, st.sampled_from([0, 64 * 1024, 100 * 1024, 164 * 1024, 228 * 1024]))
H200 = Processors(132, 228 * 1024)


@given(
    sizes, hidden_sizes, element_sizes, processors, st.sampled_from([4, 8]), st.booleans(), st.booleans(), st.booleans()
)
def test_pairs_are_covered_by_tiles_that_fit_registers_and_shared_memory(
    num_pairs, hidden_size, element_size, processors, accumulated_size, copied, centers, head
):
    accumulated_size = max(accumulated_size, element_size)
    options = accumulated_size, copied, centers, head
    shape = LaunchShape.for_pairs(num_pairs, hidden_size, element_size, processors, *options)
    assert 1 <= shape.num_programs <= MAX_WARPS // shape.num_warps * processors.count
    assert shape.num_programs <= cdiv(num_pairs, shape.block_rows), "a program without a pair"
    if shape.block_hidden < hidden_size:
        assert hidden_size * element_size > (MAX_CENTERED_ROW_BYTES if centers else MAX_ROW_BYTES) / 2
        assert shape.block_hidden * element_size == LONG_ROW_BLOCK_BYTES
        assert shape.num_stages == 1, "the loop over blocks of columns is not the one that reads ahead"
    else:
        assert shape.block_hidden * element_size <= MAX_ROW_BYTES
    register_bytes = shape.block_rows * shape.block_hidden * accumulated_size / (32 * shape.num_warps)
    most = 256 if shape.num_stages > 1 and not centers else 128
    assert register_bytes <= most or shape.num_warps == MAX_WARPS or shape.block_hidden < hidden_size
    for size in (shape.block_rows, shape.block_hidden, shape.num_warps):
        assert size & (size - 1) == 0, "Triton's blocks and warps are powers of two"
    if shape.num_stages > 1:
        ahead = 2 * (shape.num_stages - 1) * shape.block_rows * shape.block_hidden * element_size
        assert cdiv(shape.num_programs, processors.count) * (ahead + SCRATCH_BYTES) <= processors.shared_bytes
        assert copied


@given(sizes, hidden_sizes, multiprocessors)
def test_every_program_has_rows_to_write(num_rows, hidden_size, processors):
    shape = LaunchShape.for_rows(num_rows, hidden_size, processors)
    assert 1 <= shape.num_programs <= cdiv(num_rows, shape.block_rows)
    assert shape.block_rows * shape.block_hidden / (32 * shape.num_warps) <= 32


@pytest.mark.parametrize("hidden_size", [1024, 4096, 16384])
@pytest.mark.parametrize("num_pairs", [8, 64, 132])
def test_few_pairs_are_spread_over_one_program_each(num_pairs, hidden_size):
    assert LaunchShape.for_pairs(num_pairs, hidden_size, 2, H200).num_programs == num_pairs


@pytest.mark.parametrize(("num_rows", "hidden_size"), [(16, 8192), (2, 16384), (8, 2048), (128, 1024)])
def test_few_rows_are_spread_over_the_multiprocessors(num_rows, hidden_size):
    shape = LaunchShape.for_rows(num_rows, hidden_size, 132)
    assert shape.num_programs * cdiv(hidden_size, shape.block_hidden) >= 120


def test_many_pairs_take_the_persistent_grid_that_was_measured():
    assert LaunchShape.for_pairs(65536, 4096, 2, H200) == LaunchShape(264, 2, 4096, 4, 3)
    assert LaunchShape.for_pairs(65536, 4096, 2, H200, head=False) == LaunchShape(396, 2, 4096, 4, 3)
    assert LaunchShape.for_pairs(65536, 1024, 2, H200) == LaunchShape(528, 4, 1024, 2, 3)
