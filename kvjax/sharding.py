"""The mesh: batches are split over all devices, parameters are on each of them.

B batch, T tokens.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "batch"


def make_mesh(batch_size: int, field: str = "batch_size") -> Mesh:
    """All devices of all hosts in one axis; `batch_size` must be a multiple of their number."""
    devices = jax.device_count()
    if batch_size % devices:
        below = batch_size - batch_size % devices
        nearest = " or ".join(str(size) for size in (below, below + devices) if size)
        raise ValueError(f"{field}={batch_size} must be a multiple of the {devices} devices; nearest: {nearest}")
    return jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Every device gets the whole of `tree`."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Every device gets its rows of a batch whose arrays start with the batch axis."""
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    put = lambda a: jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])
    return jax.tree.map(put, batch)


def over_rows(f: Callable[..., Any], mesh: Mesh, sums: bool) -> Callable[..., Any]:
    """`f(shared, batch)` run by every device on its own rows.

    Its results are averaged over devices where `sums`, else they are rows to be put together.
    """

    def local(shared, batch):
        result = f(shared, batch)
        return jax.lax.pmean(result, AXIS) if sums else result

    rows = PartitionSpec(AXIS)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec(), rows),
        out_specs=PartitionSpec() if sums else rows,
        check_vma=False,  # lax.platform_dependent does not carry the annotation
    )
