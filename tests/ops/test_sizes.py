"""Sizes of tiles and grids as Triton counts them."""

import triton

from lizard_ops.common.sizes import cdiv, power_of_2


def test_grids_and_tiles_have_tritons_sizes():
    assert all(cdiv(n, d) == triton.cdiv(n, d) for n in range(0, 300, 7) for d in range(1, 40, 3))
    assert all(power_of_2(n) == triton.next_power_of_2(n) for n in (*range(1, 70), 255, 256, 257, 2**20 - 1))
