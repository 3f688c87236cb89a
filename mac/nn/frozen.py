"""Networks that are used without gradient, and the arithmetic in which they are evaluated.

Imagination, the flow that teaches a one-step policy and target networks take most of an update's
arithmetic, and no gradient passes through them. `Numerics.freeze` takes such networks once per update and
returns callables with the same signatures. Their matmuls may have operands of fewer bits than those of the
networks being trained. Sums, biases, activations and LayerNorm stay in float32.
"""

import contextlib
from typing import Any, Literal, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mac.nn.fused_mlp import can_fuse, fuse
from mac.nn.mlp import MLP, Dense
from mac.target_platform import target_platform

Nets = TypeVar("Nets")
Precision = Literal["auto", "float32", "tf32", "bf16"]
Kernels = Literal["auto", "plain", "fused"]

EXPONENT_BITS = 8
"""Bits of the exponent of float32, TF32 and bfloat16."""
MANTISSA_BITS = {"tf32": 10, "bf16": 7}
"""Bits that the operands of a matmul keep after the leading one; float32 keeps 23."""


class RoundedWeight(eqx.Module):
    """Weight of a matmul whose operands are rounded and whose sums are float32: `x @ weight`.

    Attributes:
        value: the rounded weight: bfloat16, which is multiplied as it is, or float32.
        bits: mantissa bits to which the other operand is rounded where `value` is float32.
    """

    value: Float[Array, "in out"]
    bits: int | None = eqx.field(static=True)

    def __getitem__(self, rows: slice) -> "RoundedWeight":
        return RoundedWeight(self.value[rows], self.bits)

    def __rmatmul__(self, x: Float[Array, "*B in"]) -> Float[Array, "*B out"]:
        x = x.astype(self.value.dtype) if self.bits is None else _round(x, self.bits)
        return jnp.matmul(x, self.value, preferred_element_type=jnp.float32)


class Numerics(NamedTuple):
    """Arithmetic of an algorithm's networks.

    It is a static part of the algorithm, and so of the key of every function compiled for it.

    Attributes:
        precision: of matmuls. "float32": all of them in full. "tf32": 10 mantissa bits, JAX's default on
            GPUs; a CPU emulates that in networks without gradient and trains in float32. "bf16": 7 bits in
            networks without gradient, emulated on a CPU, and "tf32" in the others. "auto": "tf32" on GPUs,
            "float32" on a CPU.
        kernels: of MLPs without gradient. "fused": one GPU kernel each, which a CPU interprets (slowly).
            "plain": layer by layer. "auto": "plain".
    """

    precision: Precision = "auto"
    kernels: Kernels = "auto"

    def resolved(self, platform: str | None = None) -> "Numerics":
        """Returns the choice that "auto" stands for on a platform; None: that of the program being traced."""
        on_cpu = (platform or target_platform()) == "cpu"
        precision = ("float32" if on_cpu else "tf32") if self.precision == "auto" else self.precision
        return Numerics(precision, "plain" if self.kernels == "auto" else self.kernels)

    def matmuls(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context in which programs are traced: in "float32" no matmul may round its operands."""
        if self.precision == "float32" and target_platform() != "cpu":  # a CPU has no other matmuls
            return jax.default_matmul_precision("highest")
        return contextlib.nullcontext()

    def unrolls(self) -> bool:
        """Returns whether loops over networks without gradient are written out.

        With fused kernels on an accelerator a step is so few of them that the loop's own would be half as
        many. Without inner loops an update is also a single CUDA graph.
        """
        return self.kernels == "fused" and target_platform() != "cpu"

    def freeze(self, nets: Nets) -> Nets:
        """Returns networks with the same calls and values, through whose weights no gradient passes.

        Call it once per update, outside of loops: it rounds the weights.

        Args:
            nets: networks of `mac.nn`, in any pytree; other leaves stay as they are.
        """
        nets = lax.stop_gradient(nets)
        on_cpu, (precision, kernels) = target_platform() == "cpu", self.resolved()
        exact = precision == "float32" or (precision == "tf32" and not on_cpu)
        # XLA may drop a pair of conversions, so a CPU emulates bfloat16; rounded numbers' products are exact.
        bits = None if exact or not on_cpu else MANTISSA_BITS[precision]

        def round_weight(weight: Array) -> Array:
            if exact:
                return weight
            return weight.astype(jnp.bfloat16) if bits is None else _round(weight, bits)

        def round_dense(dense: Dense) -> Dense:
            if exact:
                return dense
            return eqx.tree_at(lambda d: d.weight, dense, RoundedWeight(round_weight(dense.weight), bits))

        def frozen(leaf: Any) -> Any:
            if isinstance(leaf, Dense):
                return round_dense(leaf)
            if not isinstance(leaf, MLP):
                return leaf
            plain = eqx.tree_at(lambda mlp: mlp.dense, leaf, tuple(map(round_dense, leaf.dense)))
            if kernels == "plain" or not can_fuse(leaf):
                return plain
            return fuse(leaf, plain, round_weight, bits, interpret=on_cpu)

        return jax.tree.map(frozen, nets, is_leaf=lambda leaf: isinstance(leaf, MLP | Dense))


def _round(x: Array, bits: int) -> Array:
    """Rounds float32 numbers to so many mantissa bits."""
    return lax.reduce_precision(x, EXPONENT_BITS, bits)
