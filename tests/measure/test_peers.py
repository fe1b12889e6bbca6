"""Talking to other systems' processes, with a stand-in for their environments."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from maxsep.config import ConfigError, files
from maxsep.measure import peers

BENCH = files.load_config(str(files.REPOSITORY / "configs" / "bench.py"))
SHAPE = {"layers": 1, "d_model": 32, "batch": 2, "sequence": 8}

# In the place of the peer's own script, but with the flags and the protocol of all peers' scripts.
SCRIPT = """
import sys
sys.argv.pop(1)
sys.path.insert(0, {scripts!r})
import common
parser = common.flags("")
for name in ("--expert", "--tensor", "--capacity-factor"):
    parser.add_argument(name, type=float)
args = parser.parse_args()
out = common.claim_stdout()
print("chatter")
step = iter(range(5))
common.run(args, out, {{"system": "fake", "given": vars(args)}}, lambda: next(step))
"""


def fake(folder: Path, name: str, script: str) -> str:
    """An environment whose interpreter runs `script` instead of the file it is given."""
    python = folder / name / "bin" / "python"
    python.parent.mkdir(parents=True)
    path = folder / f"{name}.py"
    path.write_text(script)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{path}" "$@"\n')
    python.chmod(0o755)
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    return fake(tmp_path, "maxtext", SCRIPT.format(scripts=str(peers.SCRIPTS)))


def test_a_peer_gets_the_shape_and_takes_turns(folder):
    assert peers.installed(folder) == ["maxtext"]
    with peers.Peer("maxtext", folder, BENCH, SHAPE, warmup=2) as peer:
        assert peer.facts["shape"]["d_model"] == 32
        assert peer.facts["shape"]["top_k"] == 2  # not told: the bench shape
        given = peer.facts["given"]
        assert (given["expert"], given["tensor"], given["capacity_factor"], given["warmup"]) == (1, 1, 1, 2)
        turns = [peer.turn(2), peer.turn(1)]
        assert [len(turn["seconds"]) for turn in turns] == [2, 1]
        with pytest.raises(peers.PeerError, match="maxtext: ended with status 1 and said: StopIteration"):
            peer.turn(1)  # the stand-in has five steps


DECODE_SCRIPT = """
import sys
sys.argv.pop(1)
sys.path.insert(0, {scripts!r})
import common
parser = common.flags("", common.DECODE)
parser.add_argument("--variant")
args = parser.parse_args()
calls = []
facts = {{"system": "fake", "devices": 1, "given": vars(args), "calls": calls}}
common.run_decode(args, common.claim_stdout(), facts, lambda: calls.append("prefill"), lambda: calls.append("step"))
"""


def test_a_peer_decodes_in_turns(tmp_path):
    folder = fake(tmp_path, "transformers", DECODE_SCRIPT.format(scripts=str(peers.SCRIPTS)))
    size = {"batch": 2, "context": 8, "new": 5}
    with peers.Peer("transformers", folder, BENCH, size, 1, "decode", "eager") as peer:
        assert peer.name == "transformers eager"
        assert (peer.facts["task"], peer.facts["given"]["variant"]) == ("decode", "eager")
        assert peer.facts["shape"]["context"] == 8
        assert peer.facts["calls"] == ["prefill"] + ["step"] * 4, "the warm-up"
        turn = peer.turn(2)
        assert (len(turn["prefill"]), len(turn["seconds"])) == (2, 8)


def test_a_peer_that_cannot_start_says_why(tmp_path):
    folder = fake(tmp_path, "transformers", "import sys; print('out of luck', file=sys.stderr); sys.exit(3)")
    with pytest.raises(peers.PeerError, match="transformers: ended with status 3 and said: out of luck"):
        peers.Peer("transformers", folder, BENCH, SHAPE, warmup=1)


def test_a_folder_without_peers_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--peers: got .*, which has no peers; takes the folder that .*setup.sh"):
        peers.installed(str(tmp_path))


def test_what_peers_cannot_do_is_refused():
    peers.check(BENCH)
    gelu = dataclasses.replace(BENCH, model=dataclasses.replace(BENCH.model, activation="gelu"))
    with pytest.raises(ConfigError, match=r"model\.activation: got gelu; takes swiglu with --peers"):
        peers.check(gelu)


def test_the_scripts_defaults_are_the_bench_shape(folder):
    from maxsep import bench

    with peers.Peer("maxtext", folder, BENCH, {}, warmup=1) as peer:
        assert json.dumps(peer.facts["shape"]) == json.dumps(bench.facts(BENCH)["shape"])
