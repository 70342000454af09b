"""Where arrays live: logical axis names, one table that maps them to the mesh, one mesh.

Goes in: shapes of a mesh and of a parameter tree. Comes out: shardings. No other file names a mesh
axis.
"""

from __future__ import annotations

import logging

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")
AXIS_RULES = (  # logical axis -> mesh axis
    ("batch", ("data", "fsdp")),
    ("seq", None),
    ("act_embed", None),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("mlp", "tensor"),
    ("vocab", ("tensor", "fsdp")),
    ("table_embed", None),  # a table sharded here makes XLA replicate the look-up
    ("layers", None),
    ("channels", None),
)


def make_mesh(shape=None) -> Mesh:
    """A mesh (data, fsdp, tensor). `shape` defaults to all devices on the fsdp axis.

    Raises:
      ValueError: the shape does not have three axes or needs more devices than there are.
    """
    devices = jax.devices()
    shape = tuple(shape) if shape is not None else (1, len(devices), 1)
    if len(shape) != 3 or np.prod(shape) > len(devices):
        raise ValueError(
            f"mesh {shape}: expected (data, fsdp, tensor) for at most {len(devices)} devices"
        )
    devices = devices[: int(np.prod(shape))]
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_sharding(mesh: Mesh, num_rows: int) -> NamedSharding:
    """The sharding of arrays whose first axis is the rows of a batch.

    Args:
      mesh: the mesh.
      num_rows: of the batch, or of each piece that it is computed in.

    Raises:
      ValueError: the rows cannot be spread evenly.
    """
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if num_rows % shares:
        raise ValueError(
            f"{num_rows} rows over data x fsdp = {shares}: not even; change data.batch_size, "
            "optim.accumulation or mesh"
        )
    return NamedSharding(mesh, nn.logical_to_mesh(PartitionSpec("batch"), AXIS_RULES))


def rules():
    """The context in which activations follow the table."""
    return nn.logical_axis_rules(AXIS_RULES)


def param_shardings(boxed, mesh: Mesh):
    """The sharding of each parameter, from the axis names it was made with.

    An axis that the mesh does not divide is replicated and named in the log.

    Args:
      boxed: tree of `nn.LogicallyPartitioned` boxes around ShapeDtypeStructs, as `jax.eval_shape`
        of init gives.
      mesh: the mesh.

    Returns:
      Tree of NamedSharding of the same structure, without boxes.
    """
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), AXIS_RULES)

    def fit(path, leaf, spec):
        axes = []
        for size, axis in zip(leaf.shape, tuple(spec) + (None,) * (len(leaf.shape) - len(spec))):
            names = () if axis is None else (axis,) if isinstance(axis, str) else axis
            if size % int(np.prod([mesh.shape[n] for n in names])):
                where = "/".join(str(k.key) for k in path)
                logging.getLogger(__name__).warning(
                    "%s: axis of %d not divided by %s, replicated", where, size, axis
                )
                axis = None
            axes.append(axis)
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(fit, nn.unbox(boxed), specs)
