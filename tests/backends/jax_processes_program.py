"""One of two processes with two virtual devices each: the error of a ring over all four, on every process."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from anyattention import config, dot_product_attention, dot_product_attention_vjp, random


def main() -> None:
    """Arguments: the coordinator's address, and the number of this process."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
    mesh = jax.make_mesh((4,), ("seq",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, P(None, "seq"))
    arrays = [np.random.default_rng(n).standard_normal((2, 64, 2, 8)) for n in range(3)]
    given = {"is_causal": True, "dropout_rng": random.key(3), "dropout_rate": 0.3, "broadcast_dropout": False}
    output, pullback = dot_product_attention_vjp(*arrays, **given)
    expected = (output, *pullback(2 * output)[:3])

    def loss(*x):
        output = dot_product_attention(*x, **given, sequence_axis="seq")
        return jnp.sum(output**2), output

    def put(x):
        return jax.make_array_from_callback(x.shape, place, lambda index: x.astype(np.float32)[index])

    with jax.set_mesh(mesh), config(exchange="ring"):
        (_, output), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*map(put, arrays))
    errors = [
        float(np.max(abs(np.asarray(shard.data) - right[shard.index])))
        for x, right in zip((output, *gradients), expected, strict=True)
        for shard in x.addressable_shards
    ]
    sys.stdout.write(f"{len(errors)} {max(errors)}")


if __name__ == "__main__":
    main()
