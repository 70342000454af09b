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


def connect(cluster: str) -> None:
    """Makes this process one of several that train together; before anything else is computed.

    Args:
      cluster: "auto", where JAX finds the others by itself (TPU pods, Slurm, Kubernetes), or
        HOST:PORT,COUNT,INDEX: where process 0 listens, how many there are, which this is.

    Raises:
      ValueError: neither of the two.
      ConnectionError: the others do not answer, or JAX finds none.
    """
    where = {}
    if cluster != "auto":
        try:
            address, count, index = cluster.split(",")
            where = dict(
                coordinator_address=address, num_processes=int(count), process_id=int(index)
            )
        except ValueError:
            raise ValueError(
                f"{cluster!r}: expected auto or HOST:PORT,COUNT,INDEX as in 127.0.0.1:9000,2,0"
            ) from None
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(**where)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(
            f"{cluster}: the processes did not find each other ({reason}); start the same command "
            "on every host, or name HOST:PORT,COUNT,INDEX"
        ) from error


def make_mesh(shape=None, devices=None) -> Mesh:
    """A mesh (data, fsdp, tensor) of `devices`, by default those of this process's backend. `shape`
    defaults to all of them on the fsdp axis.

    Raises:
      ValueError: the shape does not have three axes or needs more devices than there are.
    """
    devices = jax.devices() if devices is None else devices
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
        where = "/".join(str(k.key) for k in path)
        return NamedSharding(mesh, _fit(leaf.shape, spec, mesh, where))

    return jax.tree_util.tree_map_with_path(fit, nn.unbox(boxed), specs)


def on_shards(function, axes):
    """`function` run by every device on its part of each array, where a mesh is set.

    An axis that the mesh does not divide is replicated.

    Args:
      function: of arrays; its result has the axes of the first of them.
      axes: for each array, the logical names of its axes.

    Returns:
      function of whole arrays.
    """

    def run(*arrays):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return function(*arrays)
        named = nn.logical_to_mesh([PartitionSpec(*names) for names in axes], AXIS_RULES)
        specs = tuple(_fit(x.shape, spec, mesh) for x, spec in zip(arrays, named))
        shards = jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)
        return shards(*arrays)

    return run


def _fit(shape, spec, mesh, where: str = "") -> PartitionSpec:
    """`spec` with axes that the mesh does not divide replicated; `where` names them in the log."""
    axes = []
    for size, axis in zip(shape, tuple(spec) + (None,) * (len(shape) - len(spec))):
        names = () if axis is None else (axis,) if isinstance(axis, str) else axis
        if size % int(np.prod([mesh.shape[n] for n in names])):
            if where:
                logging.getLogger(__name__).warning(
                    "%s: axis of %d not divided by %s, replicated", where, size, axis
                )
            axis = None
        axes.append(axis)
    return PartitionSpec(*axes)
