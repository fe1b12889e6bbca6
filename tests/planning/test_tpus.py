"""A program compiled for TPUs that are not there."""

import json
import os
import subprocess
import sys

import pytest

from maxsep.config import ConfigError
from maxsep.config.cluster import load_cluster
from maxsep.planning import target

try:
    target.versions(load_cluster("tpu-v5e:1x1"))
except ConfigError as error:
    pytest.skip(str(error), allow_module_level=True)

SMALL = (  # no slots but those that a balanced load fills
    "--config=configs/small.py",
    "--config.model.layers=2",
    "--config.model.remat=none",
    "--config.model.capacity_factor=1.0",
)


@pytest.mark.exhaustive
def test_a_step_computes_what_the_model_needs(tmp_path):
    out = tmp_path / "plan.json"
    flags = (*SMALL, "--cluster=tpu-v5e:1x8", "--runs=ma:2x4", f"--cache={tmp_path}", f"--json={out}")
    child = subprocess.run([sys.executable, "-m", "maxsep.plan", *flags], env=os.environ | {"XLA_FLAGS": ""})
    assert child.returncode == 0
    (row,) = json.loads(out.read_text())["layouts"]
    assert row["error"] is None and row["not_priced"] == {}
    assert row["flops"] == pytest.approx(row["model_flops"], rel=0.03)
    assert sum(size for kind, size in row["memory_bytes"].items() if kind != "total") == row["memory_bytes"]["total"]
    assert row["link_bytes"]["inside"] > 0
