"""Clusters as files."""

import pytest

from maxsep.config import ConfigError
from maxsep.config.cluster import FOLDER, PRECISIONS, load_cluster
from maxsep.measure.flops import PEAKS

OWN = """
from dataclasses import replace
from configs.clusters import h100

def get_cluster():
    return replace(h100.get_cluster(), between=12.5e9)
"""


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_the_clusters_here_have_the_peaks_of_the_table(name):
    cluster = load_cluster(f"{name.replace('_', '-')}:1x8")
    assert cluster.devices == 8
    if cluster.simulated:
        assert cluster.flops is None, "measured"
        return
    device = cluster.gpu.name if cluster.gpu else cluster.tpu.kind
    peaks = next(peaks for kind, peaks in PEAKS.items() if device.startswith(kind))
    of_the_table = {kind: peak * 1e12 for kind, peak in zip(PRECISIONS, peaks, strict=True) if peak}
    assert cluster.flops == pytest.approx(of_the_table)


def test_a_file_of_ones_own_may_build_on_another(tmp_path):
    path = tmp_path / "slow.py"
    path.write_text(OWN)
    cluster, other = load_cluster(f"{path}:4x8"), load_cluster("h100:4x8")
    assert (cluster.between, cluster.flops, cluster.devices) == (12.5e9, other.flops, 32)


@pytest.mark.parametrize(
    "cluster, says",
    [
        (
            "a100:4x4",
            "got 'a100'; takes a100-80gb, b200, cpu, h100, h200, tpu-v5e, tpu-v5p, tpu-v6e, or a file like",
        ),
        ("a100-80gb", "got 'a100-80gb'; takes NAME:NODESxDEVICES"),
        ("a100-80gb:4", "takes NAME:NODESxDEVICES"),
        ("a100-80gb:0x4", "takes NAME:NODESxDEVICES"),
        ("a100-80gb:9999x9999", "= 99980001 devices; takes at most 65536"),
        ("cpu:2x8", "takes 1x16, as CPU devices are simulated in one node"),
        ("", "takes NAME:NODESxDEVICES"),
    ],
)
def test_a_cluster_that_is_none_is_refused(cluster, says):
    with pytest.raises(ConfigError) as refused:
        load_cluster(cluster)
    assert str(refused.value).startswith("--cluster: ") and says in str(refused.value)


@pytest.mark.parametrize(
    "text, says",
    [
        ("1 / 0", ":1: ZeroDivisionError: division by zero"),
        ("def get_config(): pass", ": has no function get_cluster"),
        ("def get_cluster():\n    return 7", ": get_cluster() returned int; takes a Cluster"),
        (OWN.replace("12.5e9", "0"), ": between: got 0; takes a number above 0"),
        (OWN.replace("between=12.5e9", "watts='much'"), ": watts: got 'much'; takes a number above 0, or None"),
        (OWN.replace("between=12.5e9", "memory_bytes=None"), ": memory_bytes: got None; takes a number above 0"),
        (
            OWN.replace("between=12.5e9", "flops={'fp8': 1e15}"),
            ": flops: got {'fp8': 1000000000000000.0}; takes a dict",
        ),
        (OWN.replace("between=12.5e9", "gpu='H100'"), ": gpu: got 'H100'; takes a Gpu, or None"),
        (OWN.replace("between=", "beyond="), "unexpected keyword argument 'beyond'"),
    ],
)
def test_a_file_that_describes_none_is_refused(tmp_path, text, says):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_cluster(f"{path}:1x8")
    assert str(refused.value).startswith(f"--cluster: {path}") and says in str(refused.value)
    assert "\n" not in str(refused.value)
