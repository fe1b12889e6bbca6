"""The devices of a cluster that is not there, as XLA's compiler takes them."""

from importlib import metadata
from typing import Any

from maxsep.config import ConfigError
from maxsep.config.cluster import Cluster

# Only the machine's own autotuner could choose kernels. As none will run, LLVM and ptxas need not optimise them: that
# changes neither the program, its memory nor its schedule. But XLA takes no kernel that spills registers, and a few
# large ones do, on one GPU where ptxas optimises, on another where it does not. The first that XLA takes counts.
AS_THEY_ARE = {"xla_gpu_autotune_level": 0}
QUICK = AS_THEY_ARE | {"xla_backend_optimization_level": 0}
OPTIONS = (QUICK | {"xla_gpu_disable_gpuasm_optimizations": True}, QUICK, AS_THEY_ARE)
# Exact products of float32 are cuBLAS's: as kernels of Triton they take minutes to compile.
LIBRARY = {"xla_gpu_enable_triton_gemm": False}
SPILLS = "No supported config found"  # what XLA then says
ENVIRONMENT = {  # of who compiles: no device of this machine but its CPU is touched
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "CUDA_VISIBLE_DEVICES": "-1",
    "TPU_SKIP_MDS_QUERY": "1",  # no question to Google Cloud about the machine
}
INSTALL = "pip install -c constraints.txt -e '.[cuda]'"


def attempts(products: str) -> list[dict[str, Any]]:
    """The compiler options to try, in turn, for a model of such `products`."""
    return [options | (LIBRARY if products == "float32" else {}) for options in OPTIONS]


def versions(cluster: Cluster, field: str = "--cluster") -> dict[str, str]:
    """What compiles for the cluster's devices, by distribution; none for simulated ones, which JAX itself compiles for.

    `field` names the setting in errors.

    Raises:
        ConfigError: the extra `cuda` or `tpu` is missing, or of another version than JAX.
    """
    if cluster.tpu:
        if (found := _version("libtpu")) is None:
            install = INSTALL.replace("cuda", "tpu")
            raise ConfigError(f"{field}: to compile for TPUs takes the extra tpu, which is not installed: {install}")
        return {"libtpu": found}
    return _cuda_versions(field) if cluster.gpu else {}


def _cuda_versions(field: str) -> dict[str, str]:
    """JAX's plugin for NVIDIA GPUs, and cuDNN."""
    for cuda in (12, 13):
        plugin, cudnn = f"jax-cuda{cuda}-pjrt", f"nvidia-cudnn-cu{cuda}"
        found = {name: version for name in (plugin, cudnn) if (version := _version(name))}
        if plugin not in found:
            continue
        if found[plugin] != _version("jaxlib"):
            got = f"got {plugin} {found[plugin]} beside jaxlib {_version('jaxlib')}"
            raise ConfigError(f"{field}: {got}; takes the same version: {INSTALL}")
        if cudnn not in found:
            raise ConfigError(f"{field}: {plugin} is here without {cudnn}; takes the extra cuda: {INSTALL}")
        return found
    raise ConfigError(f"{field}: to compile for GPUs takes the extra cuda, which is not installed: {INSTALL}")


def cudnn(versions: dict[str, str]) -> str | None:
    """The version of cuDNN; None: nothing compiles for GPUs."""
    return next((version for name, version in versions.items() if "cudnn" in name), None)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def topology(cluster: Cluster) -> str:
    """The cluster's shape, as JAX's CUDA plugin takes it: slices, nodes, devices of a node."""
    return f"1x{cluster.nodes}x{cluster.devices_per_node}"


def description(cluster: Cluster, cudnn: str) -> str:
    """The cluster's GPU as a GpuTargetConfig of XLA (xla/stream_executor/device_description.proto), in protobuf text.

    Args:
        cluster: of GPUs.
        cudnn: version of cuDNN, from three numbers on.
    """
    gpu = cluster.gpu
    feature = "ACCELERATED_FEATURES" if gpu.accelerated_features else "NONE"
    major, minor, patch = cudnn.split(".")[:3]
    return f"""
gpu_device_info {{
  name: "{gpu.name}"
  cuda_compute_capability {{ major: {gpu.compute_capability} feature_extension: {feature} }}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus_per_core}
  shared_memory_per_core: {gpu.shared_memory_per_core}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_memory_per_block}
  l2_cache_size: {gpu.l2_cache}
  clock_rate_ghz: {gpu.clock_ghz}
  memory_bandwidth: {int(cluster.memory_bandwidth)}
  device_memory_size: {int(cluster.memory_bytes)}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  dnn_version: "{major}.{minor}.{patch}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: {major} minor: {minor} patch: {patch} }}
device_description_str: "{gpu.name}"
"""
