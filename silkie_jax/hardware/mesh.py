"""The device mesh, and the one table that says which logical axis of an array lies along which mesh axis."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool

from silkie_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axis. Parameters name their axes where they are made (models); what is not listed is replicated.
RULES: dict[str | None, str] = {
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "rank": "fsdp",
}
BATCH = ("data", "fsdp")  # rows are split over both


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (all of them by default), axes data x fsdp x tensor; -1 takes what the others leave.

    A mesh smaller than the machine uses the first devices, if it divides their number. On several TPU slices the data
    axis runs over the slices, since only it can bear the slower network between them.

    Raises:
      UserError: the sizes do not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, tensor]
    written = " x ".join(f"{name} {size}" for name, size in zip(AXES, sizes, strict=True))
    fixed = math.prod(s for s in sizes if s != -1)
    if len(devices) % fixed:
        raise UserError(f"mesh {written} does not divide the {len(devices)} devices here; their product must")
    sizes = [len(devices) // fixed if s == -1 else s for s in sizes]
    used = math.prod(sizes)
    if used < len(devices) and jax.process_count() > 1:
        raise UserError(f"mesh {written} uses {used} of {len(devices)} devices; on several hosts it must use all")
    if used < len(devices) or devices[0].platform == "cpu":
        return Mesh(np.asarray(devices[:used]).reshape(sizes), AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        # A torus of 16x16 chips has no axis of 4: one of its own is split.
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    elif sizes[0] % slices:
        raise UserError(f"mesh {written}: data must be a multiple of the {slices} slices")
    else:
        across = (slices, 1, 1)
        within = [sizes[0] // slices, *sizes[1:]]
        grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES)


def read_mesh(text: str) -> tuple[int, int, int]:
    """`data=2,fsdp=4` as sizes of data, fsdp and tensor.

    Raises:
      UserError: another axis, or no number.
    """
    sizes = {"data": -1, "fsdp": 1, "tensor": 1}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name.strip() not in sizes or not size.strip().isdecimal() or not int(size):
            raise UserError(f"--mesh: {part!r} is not like fsdp=4; the axes are {', '.join(sizes)}")
        sizes[name.strip()] = int(size)
    return sizes["data"], sizes["fsdp"], sizes["tensor"]


def sharding_of(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """Where an array with these logical axes lies.

    A dimension that its mesh axis does not divide is replicated; of two that want one mesh axis the first gets it.
    """
    spec: list[str | None] = []
    for axis, size in zip(axes, shape, strict=True):
        name = RULES.get(axis)
        spec.append(name if name and name not in spec and size % mesh.shape[name] == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Rows over data and fsdp, after `leading` unsharded dimensions."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """How many ways rows are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def platform_of(mesh: Mesh) -> str:
    """cpu, gpu or tpu."""
    platform = mesh.devices.flat[0].platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def put(arrays: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A batch [A, B, ...] onto the devices, sequences over the batch axes; each host gives those of its devices."""
    where = batch_sharding(mesh, leading=1)
    return {k: jax.make_array_from_callback(v.shape, where, v.__getitem__) for k, v in arrays.items()}


def local_sequences(mesh: Mesh, count: int) -> Bool[np.ndarray, "B"]:
    """Which of `count` sequences lie on this host's devices."""
    local = np.zeros(count, bool)
    for index in batch_sharding(mesh).addressable_devices_indices_map((count,)).values():
        local[index] = True
    return local
