"""Devices of one or several processes, and what lies on them: a shard of the clients on each, the rest everywhere."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fedbbpt_jax.federated.cohort import ClientData

CLIENTS, RUNS = "clients", "runs"  # the axis of a mesh


def make_mesh(num_devices: int, axis: str = CLIENTS) -> Mesh:
    """Returns a mesh over the first so many devices of all processes, or over all if there are fewer."""
    devices = jax.devices()[:num_devices]
    return jax.make_mesh((len(devices),), (axis,), devices=devices, axis_types=(AxisType.Auto,))


def place_clients(clients: ClientData, mesh: Mesh) -> ClientData:
    """Returns clients, packed into as many shards as the mesh has devices, each shard on its own device."""
    rest = replicate((clients.starts, clients.sizes, clients.places), mesh)
    return ClientData(_place(clients.examples, mesh, PartitionSpec(CLIENTS)), *rest)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Returns the same arrays on every device of a mesh."""
    return _place(tree, mesh, PartitionSpec())


def here(tree: Any) -> Any:
    """Returns what every device holds alike, such as a server's state, as arrays of one device of this process."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def _place(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """Returns arrays on a mesh; each process moves only the parts that its own devices hold."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree)
