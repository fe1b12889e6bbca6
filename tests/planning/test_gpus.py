"""A program compiled for GPUs that are not there."""

import json
import os
import subprocess
import sys

import pytest

from maxsep.config import ConfigError
from maxsep.planning import target

try:
    target.cuda_versions()
except ConfigError as error:
    pytest.skip(str(error), allow_module_level=True)


CLUSTERS = [pytest.param("a100-80gb:4x4", marks=pytest.mark.slow)]
CLUSTERS += [pytest.param(f"{name}:2x8", marks=pytest.mark.exhaustive) for name in ("h100", "h200", "b200")]


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_the_studys_run_without_rematerialisation_computes_what_the_model_needs(tmp_path, cluster):
    out = tmp_path / "plan.json"
    command = [
        sys.executable,
        "-m",
        "maxsep.plan",
        f"--cluster={cluster}",
        "--runs=ma_folded:4x4",
        "--config.model.remat=none",
    ]
    child = subprocess.run(
        [*command, f"--cache={tmp_path}", f"--json={out}"],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    assert child.returncode == 0, child.stderr
    row = json.loads(out.read_text())["layouts"][0]
    assert row["flops"] == pytest.approx(row["model_flops"], rel=0.03)
    assert row["attention_kernel"] == "cudnn"
    assert row["not_priced"] == {}
    assert sum(size for kind, size in row["memory_bytes"].items() if kind != "total") == row["memory_bytes"]["total"]
    assert row["link_bytes"]["between"] > 0 and row["link_bytes"]["inside"] > 0
    assert 0 < row["mfu"] < 1
