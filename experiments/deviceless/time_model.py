"""Model of the time that a GPU program takes; no measurement has fitted its constants.

A kernel takes the longer of its traffic and its product, and each launch a fixed time. Kernels follow one
another. A product is computed in tiles that are spread over the card's cores; small products do not fill it.
"""

from typing import NamedTuple

from experiments.deviceless.cards import Card, Rates
from mac.run.cost.gpu_program import Kernel, Product

LAUNCH = 1.5e-6
"""Seconds from one small kernel to the next inside a CUDA graph (assumed)."""
HOST_WAIT = 15e-6
"""Seconds of an iteration of a loop whose end only the device knows (assumed)."""
IN_CACHE = 30e6
"""Bytes of a kernel up to which its operands are assumed to be in the L2 cache."""
TILES = ((128, 256, 1.0), (128, 128, 0.9), (64, 128, 0.75), (64, 64, 0.6), (32, 64, 0.4))
"""Rows and columns of a product's tiles, and the share of the card's rate that they reach (assumed)."""
TILE_START = 0.8e-6
"""Seconds until a tile's first operands have arrived (assumed)."""


class Cost(NamedTuple):
    """Cost of a set of kernels, per call of the program or per update.

    Attributes:
        busy: modelled seconds of the kernels themselves, without launching them.
        roofline_flops: seconds of the products at the card's rate of their precision.
        roofline_bytes: seconds of the traffic from memory at the card's rate.
    """

    launches: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    busy: float = 0.0
    roofline_flops: float = 0.0
    roofline_bytes: float = 0.0

    @property
    def roofline(self) -> float:
        """Seconds that the card cannot fall below, by arithmetic or by traffic."""
        return max(self.roofline_flops, self.roofline_bytes)

    @property
    def seconds(self) -> float:
        """Modelled seconds."""
        return self.busy + LAUNCH * self.launches


def cost_of(kernels: list[Kernel], card: Card, per: float = 1) -> Cost:
    """Sums the cost of kernels, divided by `per`, such as the updates of a segment."""
    total = Cost()
    for each in kernels:
        flops = each.product.flops if each.product else 0
        one = Cost(
            launches=1,
            flops=flops,
            bytes=each.bytes,
            busy=kernel_seconds(each, card),
            roofline_flops=flops / product_rate(each.product, card.rates) if each.product else 0.0,
            roofline_bytes=each.bytes / card.rates.memory,
        )
        total = Cost(*(a + each.times / per * b for a, b in zip(total, one, strict=True)))
    return total


def product_rate(product: Product, rates: Rates) -> float:
    """Returns the card's rate for a product, FLOP/s, by the precision of its operands."""
    if product.dtype in ("bf16", "f16"):
        return rates.bf16
    return rates.tf32 if product.tf32 else rates.f32


def kernel_seconds(kernel: Kernel, card: Card) -> float:
    """Returns the modelled seconds of one launch of a kernel, without the launch itself."""
    traffic = kernel.bytes / (card.rates.cache if kernel.bytes < IN_CACHE else card.rates.memory)
    if kernel.product is None:
        return traffic
    return max(traffic, product_seconds(kernel.product, product_rate(kernel.product, card.rates), card.cores))


def product_seconds(product: Product, rate: float, cores: int) -> float:
    """Returns the modelled seconds of a product with the best of `TILES`, its depth split among 1 to 8."""
    best = float("inf")
    for rows, columns, share in TILES:
        tiles = -(-product.rows // rows) * -(-product.columns // columns) * product.batch
        for split in (1, 2, 4, 8):
            if split > 1 and product.depth // split < 32:
                continue
            waves = -(-tiles * split // cores)
            depth = max(product.depth, 32) / split
            one = 2 * rows * columns * depth / (rate * share / cores) + TILE_START
            best = min(best, waves * one + (split > 1) * 1e-6)
    return best
