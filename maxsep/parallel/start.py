"""What has to be settled before JAX starts its backend: devices, compiler flags, caches, and whether the run fits.

JAX is imported inside the functions, after the environment is set.
"""

import contextlib
import dataclasses
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from maxsep.cluster import holder
from maxsep.cluster.job import ALONE, Job
from maxsep.config import Config, ConfigError, paths
from maxsep.config.matrices import parameters
from maxsep.config.validate import validate
from maxsep.parallel.accelerators import check_seen

# On GPUs collectives run beside kernels that do not wait for them, and the program has all memory but some GB, which
# communication and libraries need. XLA by itself: they do not, and three quarters of it.
SCHEDULER, MEMORY = "--xla_gpu_enable_latency_hiding_scheduler", "XLA_PYTHON_CLIENT_MEM_FRACTION"
PRECISION = {"float32": "highest", "tf32": "tensorfloat32"}  # JAX's names; by itself it takes TF32 on NVIDIA GPUs
INITIALIZATION = 300  # seconds, JAX's own: until it has met all processes
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy")
HELD = 30.0  # seconds for which JAX's connections to process 0 stay open after its death


def start(config: Config, fit_mesh: bool, training: bool = True, job: Job = ALONE) -> Config:
    """Starts JAX for `config` and checks that the job's machines can run it.

    Without accelerators the mesh's devices are simulated on the CPU, as many in each process.

    Args:
        config: a validated config.
        fit_mesh: fit the mesh to the accelerators there are, instead of refusing when they are too few.
        training: gradients and the optimizer's moments are needed beside the weights.
        job: this process and the others.

    Returns:
        The config, its mesh fitted where that was asked for.

    Raises:
        ConfigError: too few devices, or devices that are left over in one of several processes, or too little memory
            for the model's state.
    """
    job.at("starting JAX")
    settle(config, _number("JAX_NUM_CPU_DEVICES") or _simulated(config, fit_mesh, job))
    if job.count > 1:
        _start_distributed(job)

    from maxsep.parallel.mesh import describe

    devices = _devices()
    if devices[0].platform == "cpu":
        check_seen(job.count)
    if fit_mesh and (devices[0].platform != "cpu" or (job.count > 1 and config.mesh.devices != len(devices))):
        config = fitted(config, len(devices), training)
        print(f"mesh fitted to {describe(devices)}: {config.mesh}", flush=True)
    if job.count > 1 and config.mesh.devices != len(devices):
        got = f"got {config.mesh} = {config.mesh.devices} devices"
        raise ConfigError(f"mesh: {got}; takes all that the processes have, {describe(devices)}")
    if config.mesh.devices > len(devices):
        raise ConfigError(f"mesh: got {config.mesh} = {config.mesh.devices} devices; takes at most {describe(devices)}")
    if config.mesh.devices < len(devices):
        print(f"using the first {config.mesh.devices} of {describe(devices)}", flush=True)
    if devices[0].platform == "cpu" and config.mesh.devices > 1:
        _keep_no_programs()
    else:
        _keep_programs()
    _check_memory(config, training, len(job.here) / job.count)
    return config


def settle(config: Config, simulated: int) -> None:
    """Sets what compiled programs depend on: XLA's flags and threads, JAX's types, the CPU devices to simulate."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's C++ log: errors only
    # Simulated devices share the cores: one may wait minutes for the others. XLA's limit would kill the run.
    _xla_flag("--xla_cpu_collective_call_terminate_timeout_seconds=600")
    _leave_a_thread_free(simulated)
    _xla_flag(f"{SCHEDULER}=true")
    os.environ.setdefault(MEMORY, "0.92")
    if config.train.deterministic:
        _xla_flag("--xla_gpu_deterministic_ops=true")

    import jax

    jax.config.update("jax_enable_x64", config.model.dtype == "float64")
    jax.config.update("jax_default_matmul_precision", PRECISION.get(config.model.products))
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", simulated)


def of_gpus() -> str:
    """What `settle`, or the user, has set for GPUs, for people."""
    scheduler = re.findall(rf"{SCHEDULER}(?:=(\S+))?", os.environ.get("XLA_FLAGS", ""))
    hides = scheduler and scheduler[-1].lower() not in ("false", "0")
    return f"latency-hiding scheduler {'on' if hides else 'off'}, memory fraction {os.environ.get(MEMORY, '0.75')}"


def _devices() -> list:
    """JAX's devices.

    Raises:
        ConfigError: there are none of the kind that is asked for.
    """
    import jax

    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as e:  # the latter where JAX_PLATFORMS=cuda, and there is no GPU
        if (asked := os.environ.get("JAX_PLATFORMS")) is None:
            raise
        why = f" ({' '.join(str(e).split())})" if str(e) else ""
        raise ConfigError(f"JAX_PLATFORMS: got {asked!r}, of which JAX finds no device here{why}; takes cpu") from e


def _simulated(config: Config, fit_mesh: bool, job: Job) -> int:
    """Devices that this process simulates where there are no accelerators.

    Raises:
        ConfigError: the mesh has no equal part for each process.
    """
    if config.mesh.devices % job.count == 0:
        return config.mesh.devices // job.count
    if fit_mesh:
        return 1
    takes = f"a multiple of {job.count} devices, as each of {job.count} processes has its part"
    raise ConfigError(f"mesh: got {config.mesh} = {config.mesh.devices} devices; takes {takes}")


def _start_distributed(job: Job) -> None:
    """JAX's own meeting of the processes, on the port of the roll call that is over."""
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    # The job ends itself before JAX aborts in C++.
    seconds = int(4 * job.heartbeat + 60)
    with _without_proxies():
        jax.distributed.initialize(
            job.process.address,
            job.count,
            job.index,
            local_device_ids=job.gpus,
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=seconds,
            initialization_timeout=max(seconds, INITIALIZATION, int(job.joining)),
        )
    if job.first:
        job.holder = holder.hold(job.process.port, [peer.connection.link.fileno() for peer in job.peers], HELD)


@contextlib.contextmanager
def _without_proxies() -> Iterator[None]:
    """The environment without its proxies, through which gRPC would look for process 0; child processes keep them."""
    names = [name for name in os.environ if name.lower() in PROXIES]
    proxies = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(proxies)


def fitted(config: Config, devices: int, training: bool = True) -> Config:
    """`config` on a mesh that divides what it splits, of as many of the `devices` devices as possible.

    The stages stay; the other two axes are as equal as can be.

    Raises:
        ConfigError: no such mesh has this many stages on so few devices.
    """
    stage = config.mesh.stage
    for count in range(devices // stage, 0, -1):
        for attention in range(math.isqrt(count), 0, -1):
            if count % attention == 0:
                mesh = dataclasses.replace(config.mesh, attention=attention, expert=count // attention)
                candidate = dataclasses.replace(config, mesh=mesh)
                try:
                    validate(candidate, training)
                except ConfigError:
                    continue
                return candidate
    raise ConfigError(f"mesh.stage: got {stage}; takes a number of stages that {devices} devices can be split into")


def _xla_flag(flag: str) -> None:
    """Adds a flag, unless the user has set it."""
    flags = os.environ.get("XLA_FLAGS", "")
    if flag.partition("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


def _leave_a_thread_free(devices: int) -> None:
    """Gives XLA's CPU backend more threads than simulated devices.

    Where every thread is busy with a device, a large matrix product may take wrong numbers: seen in the output head's
    gradient, the first rows of each device's part, on JAX 0.10 and 0.12.
    """
    if (_number("PJRT_NPROC") or cores()) <= devices:
        os.environ["PJRT_NPROC"] = str(devices + 1)


def cores() -> int:
    """Cores that this process may use, as XLA counts them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _number(variable: str) -> int | None:
    """An environment variable's value; None where it is not set, or no number: JAX complains of that itself."""
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else None


def _keep_programs() -> None:
    """XLA's compiled programs are kept in the user's cache folder, so that the next run starts in seconds."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:  # JAX reads it itself; empty means no cache
        return
    folder = paths.user_cache()
    if folder is None:
        print("warning: no compilation cache: this user has no home", file=sys.stderr, flush=True)
        return
    folder /= "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("not writable")
    except OSError as e:
        print(f"warning: no compilation cache in {folder}: {e.strerror or e}", file=sys.stderr, flush=True)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _keep_no_programs() -> None:
    """Turns the cache of compiled programs off.

    XLA's CPU backend does not store which collectives of a program wait for each other. Loaded again, two of them may
    run at once and take each other's data (seen as segmentation faults on JAX 0.10 and 0.12).
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if folder := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        print(f"warning: no compilation cache in {folder}: several simulated devices cannot use one", file=sys.stderr)
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks for that setting once


def _check_memory(config: Config, training: bool, share: float) -> None:
    """Refuses what cannot fit: the least that the model's state takes, against the memory that there is.

    `share` of the processes is on this machine. A process asks its own accelerators: JAX does not tell of others'.
    """
    import jax

    from maxsep.parallel.weights import bytes_on_device

    need = bytes_on_device(config, training)
    what = "weights, gradients and moments" if training else "weights"
    if jax.default_backend() == "cpu":
        simulated = round(config.mesh.devices * share)
        have, where = available_memory(), f"this machine has left for {simulated} simulated devices"
        need *= simulated
    else:
        have, where = device_memory(), f"a device has; they are split over {config.mesh}, under {config.layout}"
    if need > have:
        raise ConfigError(
            f"model: got {parameters(config.model) / 1e9:.2f} B parameters; their {what} need at least "
            f"{need / 2**30:.1f} GiB; takes at most the {have / 2**30:.1f} GiB that {where}"
        )


def device_memory() -> float:
    """Bytes that XLA may take on each accelerator of this process; infinite for simulated devices."""
    import jax

    return min((device.memory_stats() or {}).get("bytes_limit", math.inf) for device in jax.local_devices())


def available_memory() -> float:
    """Bytes a new process can use; infinite where the system does not tell."""
    limits = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        limit, used = (Path("/sys/fs/cgroup", f).read_text().strip() for f in ("memory.max", "memory.current"))
        limits += [int(limit) - int(used)] if limit != "max" else []
    except OSError:
        pass
    return min(limits, default=math.inf)
