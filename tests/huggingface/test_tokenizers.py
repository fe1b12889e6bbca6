"""A model's tokenizer goes with it: in beside the run, out beside the weights, with the same ids."""

import json
import shutil

import hypothesis
import pytest
from conversion import GOLDEN, converted, exported, imported
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from maxsep.config import cli
from maxsep.config.stored import read_config
from maxsep.data import tokenizer
from maxsep.huggingface import tokenizer_files

TEXT = "the cat sat on the mat and the dog ran to the log in the fog, 12 times."


def files(folder):
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.fixture
def model(tmp_path):
    """A model with a tokenizer.json that begins texts with <s>, and whose end of a text only config.json tells."""
    folder = shutil.copytree(GOLDEN / "mixtral_odd", tmp_path / "model")
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    words.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<s>", "[END]"]))
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    words.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    (folder / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}, "add_bos_token": true}')
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, 5]}))
    return folder


def test_a_tokenizer_json_goes_in_and_out(model, tmp_path):
    run = imported(model, tmp_path / "run")
    moved = run.rename(tmp_path / "moved")
    out = exported(moved, tmp_path / "out")
    before, after = files(model), files(out)
    assert after["tokenizer.json"] == before["tokenizer.json"]
    assert after["special_tokens_map.json"] == before["special_tokens_map.json"]
    assert after["tokenizer_config.json"].items() >= before["tokenizer_config.json"].items()
    assert after["tokenizer_config.json"]["eos_token"] == "[END]"
    assert (after["config.json"]["bos_token_id"], after["config.json"]["eos_token_id"]) == (1, [2, 5])
    assert after["generation_config.json"] == {"eos_token_id": [2, 5]}


def test_a_completion_ends_with_each_id_that_ends_one(model, tmp_path, complete, capsys):
    """Those of config.json and of generation_config.json; they come along when it is exported."""
    out, config = tmp_path / "out.jsonl", json.loads((model / "config.json").read_text())

    def completion(run) -> dict:
        how = ("--prompt=the dog", "--max_new_tokens=8", "--temperature=0", f"--json={out}")
        assert complete(f"--workdir={run}", *how)[0] == cli.DONE
        return json.loads(out.read_text())

    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": 2}))
    endless = completion(imported(model, tmp_path / "endless"))
    assert not endless["ended"]
    last = next(token for token in endless["tokens"] if token != endless["tokens"][0])
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, 3]}))
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": [2, last]}))
    capsys.readouterr()
    run = imported(model, tmp_path / "run")
    assert f"a text ends with id 2; a completion also with 3, {last}\n" in capsys.readouterr().out
    ended = completion(run)
    assert ended["ended"] and ended["tokens"] == endless["tokens"][: endless["tokens"].index(last)]
    after = files(exported(run, tmp_path / "back"))
    assert after["config.json"]["eos_token_id"] == [2, 3, last]
    assert after["generation_config.json"] == {"temperature": 0.6, "eos_token_id": [2, 3, last]}


def test_ends_come_along_without_a_tokenizer(tmp_path):
    model = shutil.copytree(GOLDEN / "mixtral_odd", tmp_path / "model")
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 45, 99]}')  # 99 is no id of the model
    run = imported(model, tmp_path / "run")
    assert read_config(run)[0].data.tokenizer == "ids:67:2,45"
    assert files(exported(run, tmp_path / "back"))["config.json"]["eos_token_id"] == [2, 45]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ids", ["</s>", [2, "</s>"], 2.5, True])
def test_ends_that_are_no_ids_are_refused(tmp_path, capsys, name, ids):
    folder = shutil.copytree(GOLDEN / "mixtral_odd", tmp_path / "model")
    fields = json.loads((folder / "config.json").read_text())
    (folder / name).write_text(json.dumps((fields if name == "config.json" else {}) | {"eos_token_id": ids}))
    assert converted("import", f"--checkpoint={folder}", f"--workdir={tmp_path / 'run'}") == cli.USER_ERROR
    what = f"--checkpoint: {folder}/{name}: eos_token_id: got {ids}; takes an id, or a list of ids"
    assert capsys.readouterr().err == f"error: {what}\n" and not (tmp_path / "run").exists()


def test_prompts_and_texts_begin_as_transformers_begins_them(model, tmp_path, complete):
    run = imported(model, tmp_path / "run")
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode("the cat").ids
    assert ids[0] == 1
    texts, out = tmp_path / "texts.jsonl", tmp_path / "out.jsonl"
    texts.write_text('{"text": "the cat"}\n' + json.dumps({"tokens": ids}) + "\n")
    how = (f"--score={texts}", f"--json={out}", "--config.model.dtype=float64")
    assert complete(f"--workdir={run}", *how)[0] == cli.DONE
    begun, given = (json.loads(line) for line in out.read_text().splitlines())
    assert begun["tokens"] == given["tokens"] == ids
    assert begun["logprobs"][1:] == pytest.approx(given["logprobs"][1:], rel=1e-9)
    # Ids that the tokenizer lacks have a probability too, as in the same model without a tokenizer.
    plain = imported(GOLDEN / "mixtral_odd", tmp_path / "plain")
    assert read_config(run)[0].model.vocab_size > tokenizer.load(str(run / "tokenizer.json")).vocab_size
    texts.write_text(json.dumps({"tokens": ids}) + "\n")
    assert complete(f"--workdir={plain}", *how)[0] == cli.DONE
    alone = json.loads(out.read_text())
    assert alone["tokens"] == ids and alone["logprobs"][1:] == pytest.approx(given["logprobs"][1:], rel=1e-9)
    texts.write_text('{"text": "the cat"}\n')
    # What is trained on has no beginning; it can be had without.
    assert tokenizer.load(read_config(run)[0].data.tokenizer).encode("the cat") == ids[1:]
    assert complete(f"--workdir={run}", *how, "--config.data.begin_prompts=False")[0] == cli.DONE
    assert json.loads(out.read_text().splitlines()[0])["tokens"] == ids[1:]


def test_without_a_tokenizer_ids_are_text(tmp_path, capsys, complete):
    run = imported(GOLDEN / "olmoe_odd", tmp_path / "run")
    assert "without a tokenizer.json: it takes ids alone, as numbers\n" in capsys.readouterr().out
    status, out, err = complete(f"--workdir={run}", "--prompt=1 5 66", "--max_new_tokens=3", "--temperature=0")
    assert (status, err) == (cli.DONE, "")
    assert any(line.startswith("1 5 66 ") and len(line.split()) == 6 for line in out.splitlines())
    for prompt in ("1 five", "67", "-1", "٣"):
        status, _, err = complete(f"--workdir={run}", f"--prompt={prompt}")
        assert status == cli.USER_ERROR
        assert "is no id below 67, and this model takes ids alone" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["ids:0", "ids:", "ids:x", "ids:5:5", "ids:5:", "ids:-3", "ids:05", "ids:5:1,", "ids:5:1,5"]
)
def test_ids_are_spelled_so(name):
    with pytest.raises(ValueError, match=rf"^data\.tokenizer: got '{name}'; takes ids:N, or ids:N:E"):
        tokenizer.load(name)


def test_ids_and_their_end():
    assert tokenizer.load("ids:32000:2").end_of_text == 2
    assert tokenizer.load("ids:32000").end_of_text == -1 and tokenizer.load("ids:32000").ends == []
    assert tokenizer.load("ids:32000:2,45").ends == [2, 45]
    assert tokenizer.load("ids:32000:2,45").fingerprint == tokenizer.load("ids:32000:2").fingerprint
    assert tokenizer.load("ids:9").decode([3, 1]) == "3 1"


@pytest.fixture(scope="module", params=["gpt2:257", "gpt2:1000", "gpt2"])
def pair(request):
    ours = tokenizer.load(request.param)
    written = tokenizer_files.written(ours, request.param)
    return ours, Tokenizer.from_str(written["tokenizer.json"].decode()), json.loads(written["tokenizer_config.json"])


@hypothesis.given(st.text() | st.text("abcd'st \n\t12é").map(lambda text: text * 3))
@hypothesis.example("It's  two\n\n  lines\t\t of 1234 naïve \u00a0 cafés, don't\u3000 你好 ")
def test_gpt2_is_written_with_the_same_ids(pair, text):
    ours, theirs, settings = pair
    hypothesis.assume(settings["eos_token"] not in text)
    ids = theirs.encode(text).ids
    assert ids == ours.encode(text)
    assert theirs.decode(ids) == text


def test_gpt2_ends_texts_alike(pair):
    ours, theirs, settings = pair
    assert theirs.token_to_id(settings["eos_token"]) == ours.end_of_text
    assert theirs.get_vocab_size() == ours.vocab_size


def test_bytes_have_no_such_form(finished_run, tmp_path, capsys):
    out = exported(finished_run, tmp_path / "out")
    told = capsys.readouterr().out
    assert "without a tokenizer: bytes has no tokenizer.json; ids are the run's own\n" in told
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 257
    assert converted("import", f"--checkpoint={out}", f"--workdir={tmp_path / 'back'}") == cli.DONE
