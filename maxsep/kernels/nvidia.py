"""Where kernels for NVIDIA GPUs can run."""

import re

import jax


def obstacle(platform: str) -> str | None:
    """Why kernels that need tensor cores of bfloat16, NVIDIA's since Ampere, cannot run on `platform`; None: they can.

    A process without a GPU may compile for one: that is taken to be new enough.
    """
    if platform not in ("gpu", "cuda"):
        return f"the platform is {platform}"
    if jax.default_backend() != "gpu":
        return None
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    if not re.fullmatch(r"\d+\.\d+", capability):  # on AMD's it is a name
        return f"this machine has {device.device_kind}, which is not NVIDIA's"
    return None if float(capability) >= 8 else f"this machine has {device.device_kind}, older than Ampere"
