"""A program compiled for GPUs that are not there."""

import json
import os
import subprocess
import sys

import pytest

from maxsep.config import ConfigError
from maxsep.config.cluster import load_cluster
from maxsep.planning import target

try:
    target.versions(load_cluster("h100:1x1"))
except ConfigError as error:
    pytest.skip(str(error), allow_module_level=True)


DROPLESS = ["--config.model.capacity_factor=None", "--config.model.capacity_group=None"]
CLUSTERS = [pytest.param("a100-80gb:4x4", marks=pytest.mark.slow)]
CLUSTERS += [pytest.param(f"{name}:2x8", marks=pytest.mark.exhaustive) for name in ("h100", "h200", "b200")]


def planned(folder, *arguments) -> dict:
    """The row of a plan of one layout."""
    out = folder / "plan.json"
    command = [sys.executable, "-m", "maxsep.plan", *arguments, f"--cache={folder}", f"--json={out}"]
    child = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""})
    assert child.returncode == 0, child.stderr
    return json.loads(out.read_text())["layouts"][0]


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_the_studys_run_without_rematerialisation_computes_what_the_model_needs(tmp_path, cluster):
    row = planned(tmp_path, f"--cluster={cluster}", "--runs=ma_folded:4x4", "--config.model.remat=none")
    assert row["flops"] == pytest.approx(row["model_flops"], rel=0.03)
    assert row["attention_kernel"] == "cudnn"
    assert row["not_priced"] == {}
    assert sum(size for kind, size in row["memory_bytes"].items() if kind != "total") == row["memory_bytes"]["total"]
    assert row["link_bytes"]["between"] > 0 and row["link_bytes"]["inside"] > 0
    assert 0 < row["mfu"] < 1


@pytest.mark.parametrize("cluster", [pytest.param("a100-80gb:4x4", marks=pytest.mark.slow), *CLUSTERS[1:]])
def test_dropless_experts_compute_their_rows_and_send_at_most_one_and_a_half_times_them(tmp_path, cluster):
    """No product of every row with every expert is left, nor repeated; what is sent is the room of one round."""
    row = planned(tmp_path, f"--cluster={cluster}", "--runs=ma:4x4", *DROPLESS)
    assert row["flops"] == pytest.approx(row["model_flops"], rel=0.03)
    needed = 4 * 4 * 2 * 4096 * 2 * 1024 * 2048 / 16  # exchanges, layers, top_k, d_model, bytes; tokens of a device
    assert row["communication_bytes"]["dispatch"] == pytest.approx(1.5 * needed, rel=0.01)
    assert list(row["not_priced"]) == ["a loop of further rounds, in dispatch"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["highest", "tf32"])
def test_grouped_products_of_float32_are_compiled_too(tmp_path, precision):
    """And exact ones are priced as such."""
    model = [f"--config.model.float32_precision={precision}", "--config.model.layers=1"]
    row = planned(tmp_path, "--config=configs/bench.py", "--cluster=h100:1x1", *model)
    assert row["flops"] == pytest.approx(row["model_flops"], rel=0.03)
    assert row["products_seconds"] == pytest.approx(
        row["flops"] / {"highest": 67e12, "tf32": 494.7e12}[precision], rel=0.1
    )
