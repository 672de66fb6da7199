"""Whether a machine multiplies in 8 bits."""

from jax.sharding import Mesh

from silkie_jax.errors import UserError
from silkie_jax.hardware.mesh import platform_of

# NVIDIA's first with products of e4m3 and e5m2 are Ada (8.9) and Hopper (9.0).
_FIRST = (8, 9)


def check_compute(compute: str | None, mesh: Mesh) -> None:
    """Refuses `compute: fp8` where it would be slower than bfloat16. On a CPU it is computed all the same, for tests.

    Raises:
      UserError: the platform, and the mend.
    """
    platform = platform_of(mesh)
    if compute is None or platform == "cpu":
        return
    kind = mesh.devices.flat[0].device_kind
    capability = str(getattr(mesh.devices.flat[0], "compute_capability", "0.0"))
    if platform != "gpu" or tuple(map(int, capability.split("."))) < _FIRST:
        raise UserError(
            f"compute: {compute} is for GPUs that multiply in 8 bits, NVIDIA's from Ada and Hopper on, and this is "
            f"{kind}; set compute=null"
        )
