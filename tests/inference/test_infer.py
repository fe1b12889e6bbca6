"""infer.py as its user calls it, in this process, on a run of 4 steps."""

import json
import math
import re
import shutil

import pytest
from runs import snapshot

from maxsep.config import ConfigError, cli
from maxsep.config.stored import read_config
from maxsep.data import preparation
from maxsep.data.base_tokenizer import Unencodable
from maxsep.data.tokenizer import ByteTokenizer
from maxsep.inference import texts


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_are_completed_and_told(finished_run, tmp_path, complete):
    before, file = snapshot(finished_run), tmp_path / "out.jsonl"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the cat"}\n{"prompt": "é"}\n')
    how = (f"--workdir={finished_run}", "--max_new_tokens=6", "--batch_size=1", f"--json={file}")
    status, out, err = complete(f"--prompts={prompts}", *how)
    assert (status, err) == (cli.DONE, "")
    first, second = lines(file)
    assert (first["prompt"], second["prompt"]) == ("the cat", "é")
    for row in (first, second):
        assert 1 <= len(row["tokens"]) + row["ended"] <= 6
        assert row["ttft_seconds"] > 0
        assert row["prompt"] + row["text"] in out
        assert len(row["logprobs"]) == len(row["tokens"])
    assert out.index("the cat") < out.index("é") < out.index("TTFT") < out.index("TPOT")
    assert "step 4" in out
    assert snapshot(finished_run) == before, "the run is only read"

    # The same from standard input and from flags; another seed draws others.
    assert complete(*how, given="the cat\né\n")[0] == cli.DONE
    assert [row["tokens"] for row in lines(file)] == [first["tokens"], second["tokens"]]
    assert complete("--prompt=the cat", "--prompt=é", "--seed=1", *how)[0] == cli.DONE
    assert [row["tokens"] for row in lines(file)] != [first["tokens"], second["tokens"]]


def test_the_newest_run_is_taken_and_a_full_context_ends_a_text(finished_run, tmp_path, complete, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    shutil.copytree(finished_run, tmp_path / "runs" / "mine")
    status, out, err = complete("--prompt=" + "a" * 31, "--temperature=0", "--max_new_tokens=6", "--json=out.jsonl")
    assert (status, err) == (cli.DONE, "")
    assert "runs/mine, step 4, float64, on 1 x simulated CPU device, ma: stage 1 x attention 1 x expert 1" in out
    (row,) = lines(tmp_path / "out.jsonl")
    assert len(row["tokens"]) + row["ended"] == 2, "a context of 32 and the token after it"
    assert "1 at 32 tokens in all (data.sequence_length)" in out
    # A longer context may be asked for, and another mesh and type.
    other = ("--config.data.sequence_length=64", "--config.mesh.expert=2", "--config.model.dtype=float32")
    status, out, err = complete("--prompt=" + "a" * 31, "--max_new_tokens=6", "--step=best", *other)
    assert (status, err) == (cli.DONE, "")
    assert "float32, on 2 x simulated CPU device, ma: stage 1 x attention 1 x expert 2" in out


def held_out(run) -> list[list[int]]:
    """The records that a run is evaluated on."""
    corpus = preparation.ensure(read_config(run)[0], lambda text: None).corpora["files"]
    records = map(corpus.eval.__getitem__, range(len(corpus.eval)))
    return [[int(token) for token in record if token >= 0] for record in records]


def test_scores_of_the_held_out_records_are_the_evaluation(finished_run, tmp_path, complete):
    records = held_out(finished_run)
    texts, file = tmp_path / "texts.jsonl", tmp_path / "out.jsonl"
    texts.write_text("".join(json.dumps({"tokens": ids}) + "\n" for ids in records) + '{"text": "a"}\n')
    status, out, err = complete(f"--workdir={finished_run}", f"--score={texts}", f"--json={file}")
    assert (status, err) == (cli.DONE, "")
    *found, single = lines(file)
    assert [row["tokens"] for row in found] == records
    assert single == {"tokens": [97], "logprobs": [None]}
    assert all(row["logprobs"][0] is None for row in found)
    logprobs = [p for row in found for p in row["logprobs"][1:]]
    assert len(logprobs) == sum(len(ids) - 1 for ids in records)
    loss = json.loads((finished_run / "summary.json").read_text())["eval_loss"]
    assert -math.fsum(logprobs) / len(logprobs) == pytest.approx(loss, rel=1e-9)
    assert f"{loss:.6f} nats/token" in out


@pytest.mark.slow
def test_scores_of_a_run_with_a_capacity_are_its_evaluation_without(call, workdir, tmp_path, complete):
    """As far as it is printed: 4 digits."""
    assert call(workdir, model__capacity_factor=1.0, model__capacity_group=4)[0] == cli.DONE
    with_drops = json.loads((workdir / "summary.json").read_text())["eval_loss"]
    status, out, err = call(workdir, "--mode=eval", model__capacity_factor=None, model__capacity_group=None)
    assert (status, err) == (cli.DONE, "")
    without = float(re.search(r"([0-9.]+) nats/token", out).group(1))
    assert abs(without - with_drops) > 2e-4

    texts, file = tmp_path / "texts.jsonl", tmp_path / "out.jsonl"
    texts.write_text("".join(json.dumps({"tokens": ids}) + "\n" for ids in held_out(workdir)))
    assert complete(f"--workdir={workdir}", f"--score={texts}", f"--json={file}")[0] == cli.DONE
    logprobs = [p for row in lines(file) for p in row["logprobs"][1:]]
    assert -math.fsum(logprobs) / len(logprobs) == pytest.approx(without, abs=6e-5)


class Letters(ByteTokenizer):
    """Knows ASCII, and leaves out what else there is; refuses a tilde."""

    def _encode(self, text):
        if "~" in text:
            raise Unencodable("no tilde")
        return [ord(c) for c in text if c.isascii()], sum(not c.isascii() for c in text)


def test_what_a_tokenizer_lacks_is_told(tmp_path, capsys):
    coder, file = Letters(), tmp_path / "texts.jsonl"
    file.write_text('{"text": "plain"}\n{"text": "aé漢b"}\n')
    assert [p.ids for p in texts.prompts(["plain", "aé"], None, coder, 32)] == [list(b"plain"), [97]]
    assert capsys.readouterr().err == "WARNING: --prompt: prompt 2 of 2: 1 piece of 'aé' has no token and is left out\n"
    assert texts.to_score(str(file), coder, 32) == [list(b"plain"), [97, 98]]
    told = f"WARNING: --score: {file}:2: 2 pieces of 'aé漢b' have no token and are left out\n"
    assert capsys.readouterr().err == told
    with pytest.raises(ConfigError, match=r"^--prompt: got 'é', which has no token in the run's tokenizer"):
        texts.prompts(["é"], None, coder, 32)
    with pytest.raises(ConfigError, match=r"^--prompt: got 'a~', which the run's tokenizer cannot encode \(no tilde\)"):
        texts.prompts(["a~"], None, coder, 32)
    file.write_text('{"text": "a~"}\n')
    with pytest.raises(ConfigError, match=r"^--score: .*texts\.jsonl:1: got 'a~', which the run's tokenizer cannot"):
        texts.to_score(str(file), coder, 32)


BAD = {
    "no such run": (["--workdir=nowhere"], "--workdir: got nowhere, which does not exist"),
    "no run at all": ([], "--workdir: none given, and there is no run with a checkpoint under runs/"),
    "no checkpoint": (["--workdir=empty"], "has no config.json"),
    "no such step": (["--workdir=run", "--step=3"], "has 4; takes one of them"),
    "a step that is no word": (["--workdir=run", "--step=last"], "--step: got 'last'"),
    "empty prompt": (["--workdir=run", "--prompt="], "--prompt: got '', which is empty"),
    "second prompt empty": (["--workdir=run", "--prompt=a", "--prompt="], "--prompt: prompt 2 of 2"),
    "no prompt": (["--workdir=run"], "standard input: has no prompt"),
    "prompt longer than the context": (["--workdir=run", f"--prompt={'a' * 33}"], "got 33 tokens; takes at most 32"),
    "negative temperature": (["--workdir=run", "--prompt=a", "--temperature=-1"], "--temperature: got -1.0"),
    "temperature that is none": (["--workdir=run", "--prompt=a", "--temperature=nan"], "--temperature: got nan"),
    "top_p of nothing": (["--workdir=run", "--prompt=a", "--top_p=0"], "--top_p: got 0.0"),
    "top_k of nothing": (["--workdir=run", "--prompt=a", "--top_k=0"], "top_k"),
    "no new tokens": (["--workdir=run", "--prompt=a", "--max_new_tokens=0"], "max_new_tokens"),
    "file that is not there": (["--workdir=run", "--prompts=nowhere.txt"], "--prompts: got nowhere.txt (No such file"),
    "file of another kind": (["--workdir=run", "--prompts=empty.csv"], "takes a .txt file"),
    "file without prompts": (["--workdir=run", "--prompts=bad.jsonl"], "--prompts: bad.jsonl:1"),
    "file that is no text": (["--workdir=run", "--prompts=binary.txt"], "is not UTF-8"),
    "two sources of prompts": (["--workdir=run", "--prompt=a", "--prompts=empty.txt"], "takes one of the two"),
    "scores of an empty file": (["--workdir=run", "--score=empty.txt"], "--score: empty.txt is empty"),
    "scores of no JSON": (["--workdir=run", "--score=binary.jsonl"], "--score: binary.jsonl:1: is not JSON"),
    "id out of range": (
        ["--workdir=run", "--score=ids.jsonl"],
        "got '257' among the tokens; takes integers from 0 to 256",
    ),
    "text longer than the context": (["--workdir=run", "--score=long.jsonl"], "got 34 tokens; takes at most 33"),
    "scores beside prompts": (["--workdir=run", "--score=ids.jsonl", "--prompt=a"], "takes one of the two"),
    "json in no folder": (["--workdir=run", "--prompt=a", "--json=no/where.jsonl"], "--json: got"),
    "a config": (
        ["--workdir=run", "--config=configs/tiny.py", "--prompt=a"],
        "--config: got configs/tiny.py; takes none",
    ),
    "a field of training": (["--workdir=run", "--config.train.steps=3", "--prompt=a"], "train.steps: is the run's own"),
    "a field of the model in a flag file": (
        ["--workdir=run", "--flagfile=flags.txt", "--prompt=a"],
        "model.top_k: is the run's own",
    ),
    "a mesh that does not divide": (["--workdir=run", "--config.mesh.expert=3", "--prompt=a"], "mesh.expert=2"),
    "another tokenizer": (["--workdir=run", "--config.data.tokenizer=gpt2:257", "--prompt=a"], "data.tokenizer: got"),
    "a mistyped flag": (["--workdir=run", "--promt=a"], "Did you mean: prompt"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_mistake_is_one_line_and_status_2(mistake, finished_run, tmp_path, complete, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(finished_run)
    (tmp_path / "empty").mkdir()
    for name, content in {
        "empty.txt": b"",
        "empty.csv": b"a",
        "bad.jsonl": b'{"text": "a"}',
        "binary.txt": b"\xff\xfe",
        "binary.jsonl": b"{",
        "flags.txt": b"--config.model.top_k=1\n",
        "ids.jsonl": b'{"tokens": [1, 257]}',
        "long.jsonl": json.dumps({"text": "a" * 34}).encode(),
    }.items():
        (tmp_path / name).write_bytes(content)
    arguments, said = BAD[mistake]
    status, out, err = complete(*arguments)
    assert (status, out) == (cli.USER_ERROR, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert said in err
