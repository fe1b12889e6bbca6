"""A machine's accelerators that JAX does not find are never passed over in silence."""

import os

import pytest

from maxsep.config import ConfigError
from maxsep.parallel import accelerators


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """The folder of the machine's device files, in an environment without a word of accelerators."""
    monkeypatch.setattr(accelerators, "DEVICES", tmp_path)
    for name in [name for name in os.environ if name.startswith((*accelerators.GIVEN, "JAX_PLATFORMS"))]:
        monkeypatch.delenv(name)
    (tmp_path / "nvidiactl").touch()  # the driver's, without a device
    return tmp_path


@pytest.mark.parametrize(
    "device, takes", [("nvidia0", "-e '.[cuda]'"), ("kfd", "plugin for ROCm"), ("accel0", "jax[tpu]")]
)
def test_one_process_is_warned(machine, capsys, device, takes):
    (machine / device).touch()
    accelerators.check_seen(1)
    said = capsys.readouterr().err
    assert said.startswith(
        f"warning: this machine has {machine / device}, but JAX finds no accelerator, so devices are"
    )
    assert takes in said and "JAX_PLATFORMS=cpu" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "processes, environment, says",
    [
        (2, {}, "this is one of 2 processes"),
        (1, {"CUDA_VISIBLE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES=0 gives it to this process"),
        (1, {"SLURM_GPUS_ON_NODE": "4"}, "SLURM_GPUS_ON_NODE=4 gives it to this process"),
        (1, {"SLURM_STEP_GPUS": "0"}, "SLURM_STEP_GPUS=0 gives it to this process"),
    ],
)
def test_a_job_that_was_given_them_is_refused(machine, monkeypatch, processes, environment, says):
    (machine / "nvidia0").touch()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"^devices: this machine has .*nvidia0, but .*, and {says}; takes pip"):
        accelerators.check_seen(processes)


@pytest.mark.parametrize(
    "environment", [{"CUDA_VISIBLE_DEVICES": "-1"}, {"CUDA_VISIBLE_DEVICES": ""}, {"SLURM_GPUS": "0"}]
)
def test_a_launcher_may_give_none(machine, monkeypatch, capsys, environment):
    (machine / "nvidia0").touch()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    accelerators.check_seen(1)
    assert capsys.readouterr().err.startswith("warning: ")


@pytest.mark.parametrize(
    "environment, files", [({"CUDA_VISIBLE_DEVICES": "0"}, []), ({"JAX_PLATFORMS": "cpu"}, ["kfd"])]
)
def test_without_one_or_where_the_cpu_is_asked_for_nothing_is_said(machine, monkeypatch, capsys, environment, files):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in files:
        (machine / name).touch()
    accelerators.check_seen(2)
    assert capsys.readouterr().err == ""
