"""Means that are divided once, over everything that was added."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.types import Mean


def test_means_weigh_every_count_the_same():
    assert (Mean(6.0, 3.0) + Mean(10.0, 1.0)).value == 4.0  # the mean of the two means is 6
    both = Mean(jnp.array([6.0, 0.0]), jnp.array([3.0, 0.0])) + Mean(jnp.array([10.0, 2.0]), jnp.array([1.0, 4.0]))
    np.testing.assert_array_equal(both.value, [4.0, 0.5])


def test_nothing_counted_is_zero_with_gradient_zero():
    def value(x):
        return Mean(x * jnp.array([1.0, 2.0]), jnp.array([0.0, 4.0])).value

    np.testing.assert_array_equal(value(6.0), [0.0, 3.0])
    np.testing.assert_array_equal(jax.jacobian(value)(6.0), [0.0, 0.5])
