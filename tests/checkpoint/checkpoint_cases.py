"""Train states for the checkpoint tests, and comparison by bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill.sharding import Layout, MeshConfig, make_mesh
from jaxdistill.types import TrainState

AXES = {"embedding": ("vocab", "embed"), "kernel": ("layers", "embed", "mlp"), "scale": ("embed",)}


def layout(**sizes):
    """A mesh of these sizes over the first devices; nothing is one device."""
    if not sizes:
        return Layout()
    mesh = MeshConfig(**{"fsdp": 1} | sizes)
    return Layout(make_mesh(mesh, jax.devices()[: int(np.prod(list(sizes.values())))]))


def shardings(where, tree):
    """Parameters (and the moments that mirror them) by their axes, everything else replicated."""

    def place(path, leaf):
        axes = AXES.get(getattr(path[-1], "key", None))
        return where.sharding(axes, leaf.shape) if axes else where.replicated()

    return jax.tree_util.tree_map_with_path(place, tree)


def abstract(where, tree):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(where, tree))


def train_state(where, *, rows=32, seed=0):
    """All kinds of leaves: float32 and bfloat16 with special values, ints, a typed key, AdamW's nested state."""
    random = np.random.default_rng(seed)
    embedding = random.standard_normal((rows, 16), dtype=np.float32)
    embedding[0, :5] = [np.nan, np.inf, -np.inf, -0.0, np.float32(1e-45)]
    student = {
        "embedding": jnp.asarray(embedding),
        "blocks": {"kernel": jnp.asarray(random.standard_normal((2, 16, 8)), jnp.bfloat16)},
        "norm": {"scale": jnp.asarray(random.standard_normal(16), jnp.bfloat16)},
    }
    params = {"student": student, "objective": {"projector": {"scale": jnp.full(16, 0.1)}}}
    moments = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3))).init(params)
    moments = jax.tree.map(lambda x: x + jnp.asarray(3, x.dtype), moments)
    state = TrainState(
        step=jnp.asarray(12345, jnp.int32),
        params=params,
        opt_state=moments,
        rng=jax.random.fold_in(jax.random.key(7), 1),
        skipped=jnp.asarray([1, 2], jnp.int32),
    )
    return jax.tree.map(put, state, shardings(where, state))


def put(leaf, sharding):
    """`jax.device_put` that takes nan on several processes (it compares values across them, and nan differs)."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(leaf), sharding))
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: np.asarray(leaf)[index])


def bits(leaf):
    """The raw bytes of a leaf, so that nan equals nan and -0.0 differs from 0.0."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.array(leaf, copy=True).tobytes()


def all_bits(tree):
    return {jax.tree_util.keystr(path): bits(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
