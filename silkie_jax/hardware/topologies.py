"""Machines that are not there, for compilers that are: TPU slices, NVIDIA GPUs, pretended CPU devices.

libtpu and XLA's CUDA plugin compile for chips that the machine does not have; they come as wheels, with the `tpu` and
`cuda12` extras.
"""

import os
from typing import Any

from silkie_jax.errors import UserError
from silkie_jax.hardware.chips import Gpu, find_gpu

HOW = "write for example v5e:4x4, h100:8 (GPUs of one host) or cpu:8"


def prepare(topology: str) -> None:
    """Sets what JAX reads when it first looks for devices; call it before.

    Raises:
      UserError: the topology is not of a known form.
    """
    kind, _, size = topology.partition(":")
    counted = kind == "cpu" or find_gpu(kind)
    if counted and (not size.isdecimal() or int(size) < 1):
        raise UserError(f"--topology {topology}: write {kind}:N with N devices")
    import jax

    jax.config.update("jax_platforms", "cpu")
    if kind == "cpu":
        _add_flag(f"--xla_force_host_platform_device_count={size}")
    elif counted:
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
        # Which tiles a Triton matmul can take is found out on the device: cuBLAS's need none.
        _add_flag("--xla_gpu_enable_triton_gemm=false")
    else:
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        # What the compiler would otherwise ask the cloud, and complain of at length where it is not there.
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_WORKER_ID", "0")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")


def find_devices(topology: str) -> list[Any]:
    """The devices of a topology, to make a mesh of; nothing can run on them.

    Raises:
      UserError: the topology is unknown, or its compiler is not installed.
    """
    import jax
    from jax.experimental import topologies

    kind, _, size = topology.partition(":")
    gpu = find_gpu(kind)
    if kind == "cpu":
        return list(jax.devices())
    if gpu is None:
        options = {"platform": "tpu", "topology_name": topology}
        _need("libtpu", "TPU", "tpu")
    else:
        options = {"platform": "cuda", "topology_name": kind, "topology": f"1x1x{size}", "target_config": _target(gpu)}
        _need("jax_cuda12_plugin", "NVIDIA GPUs", "cuda12")
    try:
        return list(topologies.get_topology_desc(**options).devices)
    except Exception as e:
        raise UserError(
            f"--topology {topology}: {(str(e).strip() or type(e).__name__).splitlines()[0][:300]}; {HOW}"
        ) from None


def _add_flag(flag: str) -> None:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def _need(module: str, what: str, extra: str) -> None:
    try:
        __import__(module)
    except ImportError:
        raise UserError(f"compiling for {what} needs {module}; pip install 'silkie-jax[{extra}]'") from None


def _target(gpu: Gpu) -> str:
    """XLA's description of a GPU (a GpuTargetConfigProto as text)."""
    major, minor = gpu.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: {gpu.threads}
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_memory + 1024}
  shared_memory_per_block_optin: {gpu.shared_memory}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  core_count: {gpu.multiprocessors}  fpus_per_core: {gpu.fpus}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {int(gpu.chip.bandwidth)}
  l2_cache_size: {gpu.l2_cache}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {int(gpu.chip.memory)}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "NVIDIA {gpu.chip.name}"
"""
