import numpy as np
import pytest
import torch

from vocabtrim_export.lowering.quantize import BLOCK, block_size, quantize_blocks


def unpack(blocks, bits):
    q, zero = blocks.packed.numpy(), blocks.zero_points.numpy()
    if bits == 4:
        q = np.stack([q & 15, q >> 4], -1).reshape(*q.shape[:-1], -1)
        zero = np.stack([zero & 15, zero >> 4], -1).reshape(len(zero), -1)[:, : blocks.scales.shape[1]]
    values = (q.astype(np.float32) - zero[..., None]) * blocks.scales.float().numpy()[..., None]
    return values.reshape(len(q), -1)


@pytest.fixture
def weight():
    return torch.randn(70, 3 * BLOCK, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def moments():
    x = torch.randn(500, 3, BLOCK, generator=torch.Generator().manual_seed(1)) + 0.7
    return torch.einsum("nbi,nbj->bij", x, x) / 500


@pytest.mark.parametrize(
    ("bits", "size", "block"), [(8, 256, 128), (8, 576, 64), (8, 96, 32), (8, 40, 32), (4, 256, 32)]
)
def test_blocks_of_8_bits_are_the_widest_that_divide_a_row(bits, size, block):
    assert block_size(bits, size) == block
    weight = torch.randn(5, size, generator=torch.Generator().manual_seed(2))
    blocks = quantize_blocks(weight, bits, block=block)
    assert blocks.packed.shape == (5, -(-size // block), block * bits // 8)
    assert blocks.scales.shape == (5, -(-size // block))
    off, span = unpack(blocks, bits)[:, :size] - weight.numpy(), float(weight.max() - weight.min())
    assert np.abs(off).max() <= (0.6 / ((1 << bits) - 1) + (0.08 if bits == 4 else 0)) * span


@pytest.mark.parametrize(("bits", "steps"), [(4, 15), (8, 255)])
def test_values_are_within_the_rounding_of_their_block(weight, bits, steps):
    values = unpack(quantize_blocks(weight, bits), bits)
    blocks = weight.numpy().reshape(70, 3, BLOCK)
    span = blocks.max(-1) - blocks.min(-1)
    error = np.abs(values.reshape(blocks.shape) - blocks).max(-1)
    assert (error <= 1.15 * 0.5 * span / steps + (0.075 if bits == 4 else 0) * span).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_do_not_depend_on_each_other(weight, moments, bits):
    weight = weight.repeat(8, 1) + torch.arange(560)[:, None] / 500
    rows = torch.arange(3, 560, 5)
    before, after = quantize_blocks(weight[rows], bits, moments), quantize_blocks(weight, bits, moments)
    for name in ("packed", "scales", "zero_points"):
        assert torch.equal(getattr(before, name), getattr(after, name)[rows])


def test_the_bytes_do_not_depend_on_the_threads(moments):
    """Nor on whether a weight is cast before, or as the rows of several matrices."""
    weight = torch.randn(8, 500, 96, generator=torch.Generator().manual_seed(2)).bfloat16()
    before = torch.get_num_threads()
    try:
        written = []
        for threads, rows in ((1, weight.flatten(0, 1).float()), (2, weight)):
            torch.set_num_threads(threads)
            written.append(quantize_blocks(rows, 4, moments, dtype=torch.float32))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for name in ("packed", "scales", "zero_points"):
        assert torch.equal(getattr(written[0], name), getattr(written[1], name))


def test_moments_lower_the_error_of_the_product(weight, moments):
    def cost(values):
        off = (torch.from_numpy(values) - weight).view(70, 3, BLOCK)
        return torch.einsum("obi,bij,obj->", off, moments, off)

    plain, weighed = (unpack(quantize_blocks(weight, 4, given), 4) for given in (None, moments))
    assert cost(weighed) < 0.9 * cost(plain)


def test_zeros_stay_zero():
    weight = torch.zeros(2, 40)  # also: an input that is no multiple of the block
    assert not unpack(quantize_blocks(weight, 4), 4).any()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_bytes_are_those_of_a_plain_search(weight, moments, bits):
    """Each block alone, in NumPy: of three scales and two zero points the one whose product errs least."""
    blocks = quantize_blocks(weight, bits, moments)
    values = unpack(blocks, bits).reshape(70, 3, BLOCK)
    top, shrinks = (1 << bits) - 1, (0.85, 0.925, 1.0) if bits == 4 else (1.0,)
    for row, block in np.ndindex(70, 3):
        w, moment = weight[row].numpy().reshape(3, BLOCK)[block], moments[block].numpy().astype(np.float64)
        low, span = min(w.min(), 0), max(w.max(), 0) - min(w.min(), 0)
        zero_low = np.floor(-low / span * np.float32(top))
        candidates = []
        for shrink in shrinks:
            scale = span * np.float32(shrink / top)
            for zero in (zero_low, min(zero_low + 1, top)):
                off = ((np.round(w / scale + zero).clip(0, top) - zero) * scale - w).astype(np.float64)
                candidates.append((off @ moment @ off, off))
        _, best = min(candidates, key=lambda candidate: candidate[0])
        np.testing.assert_allclose(values[row, block], w + best, atol=1e-6)
