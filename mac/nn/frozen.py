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

from mac.nn.mlp import Dense
from mac.target_platform import target_platform

Nets = TypeVar("Nets")
Precision = Literal["auto", "float32", "tf32", "bf16"]

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
    bits: int = eqx.field(static=True)

    def __getitem__(self, rows: slice) -> "RoundedWeight":
        return RoundedWeight(self.value[rows], self.bits)

    def __rmatmul__(self, x: Float[Array, "*B in"]) -> Float[Array, "*B out"]:
        if self.value.dtype == jnp.bfloat16:
            x = x.astype(jnp.bfloat16)
        else:
            x = lax.reduce_precision(x, EXPONENT_BITS, self.bits)
        return jnp.matmul(x, self.value, preferred_element_type=jnp.float32)


class Numerics(NamedTuple):
    """Arithmetic of an algorithm's networks.

    It is a static part of the algorithm, and so of the key of every function compiled for it.

    Attributes:
        precision: of matmuls. "float32": all of them in full. "tf32": 10 mantissa bits, JAX's default on
            GPUs; a CPU emulates that in networks without gradient and trains in float32. "bf16": 7 bits in
            networks without gradient, emulated on a CPU, and "tf32" in the others. "auto": "tf32" on GPUs,
            "float32" on a CPU.
    """

    precision: Precision = "auto"

    def resolved(self) -> "Numerics":
        """Returns the choice that "auto" stands for on the platform of the program being traced."""
        on_cpu = target_platform() == "cpu"
        precision = ("float32" if on_cpu else "tf32") if self.precision == "auto" else self.precision
        return Numerics(precision)

    def matmuls(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context in which programs are traced: in "float32" no matmul may round its operands."""
        if self.precision == "float32" and target_platform() != "cpu":  # a CPU has no other matmuls
            return jax.default_matmul_precision("highest")
        return contextlib.nullcontext()

    def freeze(self, nets: Nets) -> Nets:
        """Returns networks with the same calls and values, through whose weights no gradient passes.

        Call it once per update, outside of loops: it rounds the weights.

        Args:
            nets: networks of `mac.nn`, in any pytree; other leaves stay as they are.
        """
        nets = lax.stop_gradient(nets)
        on_cpu, precision = target_platform() == "cpu", self.resolved().precision
        if precision == "float32" or (precision == "tf32" and not on_cpu):
            return nets
        bits = MANTISSA_BITS[precision]

        def rounded(leaf: Any) -> Any:
            if not isinstance(leaf, Dense):
                return leaf
            # XLA may drop a pair of conversions, so a CPU's bfloat16 is emulated; the products are exact.
            weight = leaf.weight
            value = (
                lax.reduce_precision(weight, EXPONENT_BITS, bits) if on_cpu else weight.astype(jnp.bfloat16)
            )
            return eqx.tree_at(lambda dense: dense.weight, leaf, RoundedWeight(value, bits))

        return jax.tree.map(rounded, nets, is_leaf=lambda leaf: isinstance(leaf, Dense))
