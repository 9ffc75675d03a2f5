"""Products with kernels, as they are or with a low-rank change beside them (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A kernel and its low-rank change, which together act as `kernel + factor * down @ up`.

    kernel: [*lead, *inputs, *outputs], as it is stored. down: [*lead, *inputs, rank] and up: [*lead, rank, *outputs].
    lead: axes that all three have, "layers" and "experts". Stands where a kernel would in the tree of parameters, and
    is sliced layer by layer as one.
    """

    kernel: Array
    down: Array
    up: Array
    factor: float = dataclasses.field(metadata={"static": True})

    def merged(self) -> Array:
        """The effective kernel, in float32."""
        lead = self.down.ndim + self.up.ndim - 2 - self.kernel.ndim
        shared = tuple(range(lead))
        over_rank = ((self.down.ndim - 1,), (lead,)), (shared, shared)
        change = jax.lax.dot_general(self.down, self.up, over_rank, precision=jax.lax.Precision.HIGHEST)
        return self.kernel.astype(jnp.float32) + self.factor * change


Kernel = Array | Adapted


def merged(kernel: Kernel) -> Array:
    """The kernel as one array; what is not adapted stays as it is."""
    return kernel.merged() if isinstance(kernel, Adapted) else kernel


def product(x: Array, kernel: Kernel, *, inputs: int, flat: bool) -> Array:
    """Contracts the first `inputs` axes of a kernel with the last axes of x, in x's dtype.

    flat: as one matrix of all tokens. With two token axes to sum over, XLA copies both operands of the kernel's
    gradient into another order first; but a length that is split over a mesh cannot be merged with the batch.
    """
    if isinstance(kernel, Adapted):
        return _adapted_product(inputs, flat, x, kernel)
    return _product(inputs, flat, x, kernel)


def _product(inputs: int, flat: bool, x: Array, kernel: Array) -> Array:
    kernel = kernel.astype(x.dtype)
    if not flat:
        return jnp.tensordot(x, kernel, axes=inputs)
    lead, outputs = x.shape[: x.ndim - inputs], kernel.shape[inputs:]
    x = x.reshape(math.prod(lead), math.prod(kernel.shape[:inputs]))
    return (x @ kernel.reshape(x.shape[1], math.prod(outputs))).reshape(*lead, *outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _adapted_product(inputs: int, flat: bool, x: Array, kernel: Adapted) -> Array:
    """With the effective kernel, which is formed here and, for the gradient, once more: it is never kept. The gradient
    of down and up is taken through their thin products, so that none of the kernel's own size is made."""
    return _product(inputs, flat, x, kernel.merged())


def _forward(inputs: int, flat: bool, x: Array, kernel: Adapted) -> tuple[Array, tuple[Array, Adapted]]:
    return _adapted_product(inputs, flat, x, kernel), (x, kernel)


def _backward(inputs: int, flat: bool, saved: tuple[Array, Adapted], slope: Array) -> tuple[Array, Adapted]:
    x, kernel = saved

    def changed(down: Array, up: Array) -> Array:
        return kernel.factor * _product(1, flat, _product(inputs, flat, x, down), up)

    _, of_x = jax.vjp(lambda x: _product(inputs, flat, x, kernel.merged()), x)
    _, of_change = jax.vjp(changed, kernel.down, kernel.up)
    # Of a kernel that is frozen nobody asks this, and the compiler drops it.
    _, of_kernel = jax.vjp(lambda given: _product(inputs, flat, x, given), kernel.kernel)
    (base,), (down, up) = of_kernel(slope), of_change(slope)
    return *of_x(slope), Adapted(base, down, up, kernel.factor)


_adapted_product.defvjp(_forward, _backward)
