"""What is no model of ours, or no whole one, is refused in one line that names it, and leaves nothing behind."""

import json
import math
import os
import re
import shutil
import signal
import time

import ml_dtypes
import numpy as np
import pytest
from conversion import GOLDEN, converted, exported, imported, tensors
from safetensors.numpy import save_file
from users import small_disk

from maxsep.config import ConfigError, cli
from maxsep.huggingface import model_config, transfer


@pytest.fixture
def model(tmp_path):
    """A copy of a golden model, of the family of that name, to be spoilt."""

    def copied(name):
        return shutil.copytree(GOLDEN / name, tmp_path / "model")

    return copied


def edited(folder, file="config.json", **fields):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | fields))


def rewritten(folder, change):
    """The model's tensors, changed, in one file."""
    found = tensors(folder)
    change(found)
    for path in folder.glob("model*"):
        path.unlink()
    save_file(found, folder / "model.safetensors")


def refused(folder, tmp_path, capsys):
    """The one line that an import ends with."""
    workdir = tmp_path / "run"
    assert converted("import", f"--checkpoint={folder}", f"--workdir={workdir}") == cli.USER_ERROR
    out, err = capsys.readouterr()
    assert "Traceback" not in out and err.startswith("error: ") and err.count("\n") == 1
    assert not workdir.exists() and not workdir.with_name("run.partial").exists()
    return err


CONFIGS = {
    "another architecture": (
        "mixtral",
        {"model_type": "llama"},
        r"model_type: got 'llama'; takes mixtral, qwen3_moe, o",
    ),
    "no architecture": ("mixtral", {"model_type": None}, r"model_type: got None"),
    "of a list": ("mixtral", {"model_type": []}, r"model_type: got \[\]"),
    "another head": (
        "mixtral",
        {"architectures": ["MixtralForSequenceClassification"]},
        r"architectures: got .*; takes M",
    ),
    "a sliding window": ("mixtral", {"sliding_window": 32}, r"sliding_window: got 32; takes null"),
    "a sliding window in Qwen3": (
        "qwen3_moe",
        {"use_sliding_window": True},
        r"use_sliding_window: got True; takes False",
    ),
    "long contexts": (
        "mixtral",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        r"rope_parameters\.rope_type: got 'yarn'; takes",
    ),
    "long contexts, as before": (
        "olmoe",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        r"rope_scaling\.type: got 'l",
    ),
    "part of a head turned": (
        "mixtral",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        r"rope_parameters\.partial_rotary_factor: got 0\.5",
    ),
    "two bases": ("olmoe", {"rope_theta": 5.0}, r"rope_parameters\.rope_theta and rope_theta: got \[10000\.0, 5\.0\]"),
    "shared experts": ("qwen3_moe", {"n_shared_experts": 1}, r"n_shared_experts: got 1; takes fields"),
    "dense layers": ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers: got \[0\]; takes \[\]"),
    "every other layer dense": ("qwen3_moe", {"decoder_sparse_step": 2}, r"decoder_sparse_step: got 2; takes 1"),
    "biases": ("olmoe", {"attention_bias": True}, r"attention_bias: got True; takes False"),
    "another activation": ("mixtral", {"hidden_act": "gelu"}, r"hidden_act: got 'gelu'; takes 'silu'"),
    "dropout": ("mixtral", {"attention_dropout": 0.1}, r"attention_dropout: got 0\.1"),
    "noise": ("mixtral", {"router_jitter_noise": 0.1}, r"router_jitter_noise: got 0\.1"),
    "quantised": ("mixtral", {"quantization_config": {"bits": 4}}, r"quantization_config: got \{'bits': 4\}"),
    "code of its own": ("mixtral", {"auto_map": {"AutoModelForCausalLM": "m.py"}}, r"auto_map: got"),
    "two numbers of experts": ("olmoe", {"num_local_experts": 3}, r"num_local_experts or num_experts: got"),
    "a size in words": ("mixtral", {"hidden_size": "16"}, r"hidden_size: got '16'; takes an integer from 1 to"),
    "any number of layers": (
        "mixtral",
        {"num_hidden_layers": 2**31 - 1},
        r"layers\.2\.input_layernorm\.weight is missing",
    ),
    "a size left out": ("mixtral", {"num_hidden_layers": None}, r"num_hidden_layers: got nothing; takes an integer"),
    "no number": ("mixtral", {"rms_norm_eps": float("nan")}, r"rms_norm_eps: got nan; takes a finite number"),
    "yes and no": ("mixtral", {"tie_word_embeddings": 1}, r"tie_word_embeddings: got 1; takes true or false"),
    "other shapes": ("mixtral", {"num_key_value_heads": 4}, r"k_proj\.weight is \[8, 16\]; takes \[16, 16\]"),
    "more layers": (
        "mixtral",
        {"num_hidden_layers": 3},
        r"safetensors to model-00004-.* is missing",
    ),
    "heads of odd size": ("mixtral", {"num_attention_heads": 16, "num_key_value_heads": 16}, r"k_proj|even number"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_that_is_not_ours(model, tmp_path, capsys, what):
    family, fields, says = CONFIGS[what]
    folder = model(f"{family}_{'even' if family == 'mixtral' else 'odd'}")
    edited(folder, **fields)
    assert re.search(says, refused(folder, tmp_path, capsys))


ANYTHING = [None, True, 0, -1, 2, 1.5, "x", "", [], [1], ["a"], {}, {"a": 1}, 1e308, 2**70, 10**400, math.nan, math.inf]


@pytest.mark.parametrize("name", ["mixtral_even", "qwen3_moe_odd", "olmoe_odd"])
def test_whatever_a_field_holds_is_read_or_refused(name):
    fields = json.loads((GOLDEN / name / "config.json").read_text())
    others = ("rope_scaling", "rope_theta", "num_experts", "num_local_experts", "head_dim", "sliding_window", "new")
    read = 0
    for changed in [{name: value} for name in (*fields, *others) for value in ANYTHING] + [
        {"rope_parameters": fields["rope_parameters"] | {name: value}}
        for name in ("rope_theta", "rope_type", "factor")
        for value in ANYTHING
    ]:
        try:
            model_config.read(fields | changed)
            read += 1
        except ConfigError as error:
            assert re.match(rf"\w*({next(iter(changed))}|experts|rope)\w*.*: got .*; takes ", str(error))
    assert read > 100


def test_harmless_fields_and_old_spellings(model, tmp_path):
    """As transformers 4 wrote them; a window that no text is longer than."""
    folder = model("mixtral_even")
    content = json.loads((folder / "config.json").read_text())
    del content["dtype"], content["rope_parameters"]
    content |= {"torch_dtype": "bfloat16", "rope_theta": 10_000.0, "rope_scaling": None, "sliding_window": 4096}
    content |= {"_name_or_path": "somewhere", "max_window_layers": 3, "a_field_of_tomorrow": None}
    (folder / "config.json").write_text(json.dumps(content))
    first, second = (imported(x, tmp_path / f"run{i}") for i, x in enumerate((GOLDEN / "mixtral_even", folder)))
    (a, b) = (json.loads((run / "config.json").read_text())["config"]["model"] for run in (first, second))
    assert a == b


def a_list(folder):
    (folder / "config.json").write_text("[]")


def no_json(folder):
    (folder / "config.json").write_text("{")


def deep(folder):
    (folder / "config.json").write_text("[" * 100_000)


def no_config(folder):
    (folder / "config.json").unlink()


def no_weights(folder):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


def truncated(folder):
    path = folder / "model-00002-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damaged(folder):
    path = folder / "model-00002-of-00004.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def empty(folder):
    (folder / "model-00002-of-00004.safetensors").write_bytes(b"")


def missing_file(folder):
    (folder / "model-00003-of-00004.safetensors").unlink()


def index(folder, **changed):
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    content["weight_map"] |= changed
    path.write_text(json.dumps(content))


def leaves(folder):
    shutil.copy(folder / "model-00001-of-00004.safetensors", folder.parent / "x.safetensors")
    index(folder, **{"lm_head.weight": "../x.safetensors"})


def absolute(folder):
    index(folder, **{"lm_head.weight": str(folder / "model-00001-of-00004.safetensors")})


def no_name(folder):
    index(folder, **{"lm_head.weight": 7})


def no_names(folder):
    index(folder, **{"lm_head.weight": ["a"]})


def no_map(folder):
    (folder / "model.safetensors.index.json").write_text("{}")


def wrong_file(folder):
    index(folder, **{"lm_head.weight": "model-00004-of-00004.safetensors"})
    index(folder, **{"model.norm.weight": "model-00001-of-00004.safetensors"})


def link_out(folder):
    path = folder / "model-00001-of-00004.safetensors"
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def link_to_a_device(folder):
    path = folder / "config.json"
    path.unlink()
    path.symlink_to("/dev/zero")


def a_folder(folder):
    (folder / "tokenizer.json").mkdir()


def bad_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"model": {}}')


def tensor(name, change):
    return lambda folder: rewritten(folder, lambda found: found.__setitem__(name, change(found[name])))


def without(name):
    return lambda folder: rewritten(folder, lambda found: found.pop(name))


def with_nan(w):
    w = w.copy()
    w[0, 0] = np.nan
    return w


def with_more(folder):
    rewritten(folder, lambda found: found.__setitem__("model.layers.0.mlp.shared_expert.weight", found[GATE]))


GATE = "model.layers.0.block_sparse_moe.gate.weight"
FILES = {
    "a config that is a list": (a_list, r"config\.json: got list; takes a JSON object"),
    "a config that is no JSON": (no_json, r"config\.json: cannot be read \("),
    "a config nested deeply": (deep, r"config\.json: cannot be read \("),
    "no config": (no_config, r"has no config\.json; takes a model's folder"),
    "no safetensors": (
        no_weights,
        r"neither .*; pytorch_model\.bin may hold programs and is not opened; takes safetens",
    ),
    "a file cut short": (truncated, r"model-00002-of-00004\.safetensors: cannot be read \(.*\); takes a whole file"),
    "a damaged file": (damaged, r"model-00002-of-00004\.safetensors: cannot be read \(.*\); takes a whole file"),
    "an empty file": (empty, r"model-00002-of-00004\.safetensors: cannot be read \(.*\); takes a whole file"),
    "a missing file": (missing_file, r"model-00003-of-00004\.safetensors: is missing; takes all files that model\.saf"),
    "an index that leaves": (leaves, r"got the file name '\.\./x\.safetensors'; takes names of files in the folder"),
    "an index with a whole path": (
        absolute,
        r"index\.json: got the file name '/.*'; takes names of files in the folder",
    ),
    "an index with a number": (no_name, r"index\.json: got the file name 7; takes"),
    "an index with lists": (no_names, r"index\.json: got the file name \['a'\]; takes"),
    "an index without a map": (no_map, r"index\.json: has no weight_map; takes one"),
    "an index of other files": (
        wrong_file,
        r"safetensors: has no .*, which model\.safetensors\.index\.json says it has",
    ),
    "a link that leaves": (link_out, r"model-00001-of-00004\.safetensors: leads to .*elsewhere; takes files in the f"),
    "a link to a device": (link_to_a_device, r"config\.json: leads to /dev/zero"),
    "a folder": (a_folder, r"tokenizer\.json: is no file; takes one"),
    "a bad tokenizer": (bad_tokenizer, r"data\.tokenizer: got .*tokenizer\.json' \(.*\); takes a tokenizer\.json"),
    "a tensor missing": (without(GATE), rf"{GATE} is missing; takes a tensor \[8, 16\]"),
    "another shape": (tensor(GATE, lambda w: w.T.copy()), rf"{GATE} is \[16, 8\]; takes \[8, 16\]"),
    "another dtype": (
        tensor(GATE, lambda w: w.astype(np.float32)),
        rf"{GATE} is F32; takes BF16, as model\.embed_tokens\.weight is",
    ),
    "integers": (tensor(GATE, lambda w: w.astype(np.int8)), rf"{GATE} is I8; takes F32, BF16, F16, F64"),
    "no number": (tensor(GATE, with_nan), r"step 0 is not finite: params\.blocks\.moe\.router\.w_lde; takes finite"),
    "a tensor too many": (with_more, r"shared_expert\.weight is none of the tensors of MixtralForCausalLM"),
}


@pytest.mark.parametrize("what", FILES)
def test_files_that_are_no_whole_model(model, tmp_path, capsys, what):
    spoil, says = FILES[what]
    folder = model("mixtral_even")
    spoil(folder)
    assert re.search(says, refused(folder, tmp_path, capsys))


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    """Its snapshots have links into the blobs beside them."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1234"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in (GOLDEN / "olmoe_odd").iterdir():
        shutil.copy(path, blobs / f"of-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/of-{path.name}")
    assert converted("import", f"--checkpoint={snapshot}", f"--workdir={tmp_path / 'run'}") == cli.DONE


COMMANDS = {
    "no command": ([], "command: none given; takes import or export"),
    "another": (["inport"], "command: got 'inport'; takes import or export"),
    "a mistyped flag": (
        ["import", "--chekpoint=x"],
        r"Unknown command line flag 'chekpoint'\. Did you mean: checkpoint",
    ),
    "no checkpoint": (["import", "--workdir=x"], "--checkpoint: none given; takes the folder of a model"),
    "no such checkpoint": (
        ["import", "--checkpoint=/nowhere", "--workdir=x"],
        r"--checkpoint: got '/nowhere', which is no",
    ),
    "no workdir": (["export", "--checkpoint=x"], "--workdir: none given; takes the folder of a run"),
    "no such run": (
        ["export", "--checkpoint=x", "--workdir=/nowhere"],
        "--workdir: got /nowhere, which does not exist",
    ),
    "a field of the model": (
        ["export", "--checkpoint=x", "--workdir=/nowhere", "--config.model.top_k=1"],
        r"model\.top_k: is the run's own and cannot be changed here",
    ),
}


@pytest.mark.parametrize("what", COMMANDS)
def test_a_mistyped_command(capsys, what):
    arguments, says = COMMANDS[what]
    assert converted(*arguments) == cli.USER_ERROR
    assert re.match(f"error: {says}", capsys.readouterr().err)


def test_nothing_is_written_over_and_what_a_kill_left_is_swept_away(tmp_path, capsys):
    partial = tmp_path / "run.partial"
    (partial / "checkpoints").mkdir(parents=True)
    (partial / "left").write_text("")
    run = imported(GOLDEN / "olmoe_odd", tmp_path / "run")
    assert not partial.exists() and not (run / "left").exists()
    assert {path.name for path in run.iterdir()} == {"config.json", "checkpoints"}
    out = exported(run, tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}
    capsys.readouterr()
    for command in ("import", "export"):
        where = (f"--checkpoint={out}", f"--workdir={run}")
        assert converted(command, *where) == cli.USER_ERROR
        assert re.fullmatch(r"error: --\w+: got .*, which is there already; takes a new .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("step", ["7", "best", "newest"])
def test_an_export_of_a_step_that_is_not_there(tmp_path, capsys, step):
    run = imported(GOLDEN / "olmoe_odd", tmp_path / "run")
    capsys.readouterr()
    out = tmp_path / "out"
    assert converted("export", f"--workdir={run}", f"--checkpoint={out}", f"--step={step}") == cli.USER_ERROR
    assert capsys.readouterr().err.startswith("error: --step: got ")
    assert list(tmp_path.iterdir()) == [run]


def test_a_full_disk_ends_an_export_and_an_import_in_one_line(tmp_path, capsys):
    run = imported(GOLDEN / "olmoe_odd", tmp_path / "run")
    capsys.readouterr()
    with small_disk(tmp_path / "disk", "16k"):
        for command, flag in (("export", "checkpoint"), ("import", "workdir")):
            where = {"workdir": run, "checkpoint": GOLDEN / "olmoe_odd"} | {flag: tmp_path / "disk" / "new"}
            assert converted(command, *(f"--{name}={path}" for name, path in where.items())) == cli.USER_ERROR
            err = capsys.readouterr().err
            assert re.fullmatch(rf"error: --{flag}: .*\n", err), err
            assert not any((tmp_path / "disk").iterdir())


@pytest.mark.parametrize(("command", "what"), [("import", "load"), ("export", "store")])
def test_a_signal_leaves_nothing(tmp_path, capsys, monkeypatch, command, what):
    run = imported(GOLDEN / "olmoe_odd", tmp_path / "run")
    capsys.readouterr()
    monkeypatch.setattr(transfer, what, lambda *_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60))
    where = {"workdir": run, "checkpoint": GOLDEN / "olmoe_odd"}
    where |= {"checkpoint" if command == "export" else "workdir": tmp_path / "new"}
    before = signal.getsignal(signal.SIGTERM)
    assert converted(command, *(f"--{name}={path}" for name, path in where.items())) == cli.STOPPED
    assert capsys.readouterr().err == "error: interrupted; nothing is left of it\n"
    assert list(tmp_path.iterdir()) == [run]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_model_is_not_taken_for_a_run(capsys, complete):
    status, _, err = complete(f"--workdir={GOLDEN / 'olmoe_odd'}", "--prompt=1")
    assert status == cli.USER_ERROR
    assert re.fullmatch(
        r"error: .*config\.json: is a Hugging Face model's; takes a run's, as python -m .* makes one.*\n", err
    )


def test_several_files_and_their_index(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "FILE_BYTES", 9_000)
    run = imported(GOLDEN / "mixtral_even", tmp_path / "run")
    out = exported(run, tmp_path / "out")
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 2
    assert all((out / name).stat().st_size < 9_000 + 5_000 for name in files), "tensors, and a header"
    content = json.loads((out / "model.safetensors.index.json").read_text())
    found = tensors(out)
    assert content["weight_map"].keys() == found.keys()
    assert content["metadata"]["total_size"] == sum(w.nbytes for w in found.values())
    assert all(w.dtype == ml_dtypes.bfloat16 for w in found.values())
    again = imported(out, tmp_path / "again")
    assert exported(again, tmp_path / "out2") and tensors(tmp_path / "out2").keys() == found.keys()
