"""A folder that is no whole model, or leads elsewhere, is refused in one line that names the file."""

import json
import re
import shutil

import numpy as np
import pytest
from conversion import GOLDEN, converted, tensors
from safetensors.numpy import save_file

from maxsep.config import cli


def rewritten(folder, change):
    """The model's tensors, changed, in one file."""
    found = tensors(folder)
    change(found)
    for path in folder.glob("model*"):
        path.unlink()
    save_file(found, folder / "model.safetensors")


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
    "no number": (
        tensor(GATE, with_nan),
        r"step 0 is not finite: params\.segments\.moe\.feed_forward\.router\.w_de; takes finite",
    ),
    "a tensor too many": (with_more, r"shared_expert\.weight is none of the tensors of MixtralForCausalLM"),
}


@pytest.mark.parametrize("what", FILES)
def test_files_that_are_no_whole_model(model, refused, what):
    spoil, says = FILES[what]
    folder = model("mixtral_even")
    spoil(folder)
    assert re.search(says, refused(folder))


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    """Its snapshots have links into the blobs beside them."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1234"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in (GOLDEN / "olmoe_odd").iterdir():
        shutil.copy(path, blobs / f"of-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/of-{path.name}")
    assert converted("import", f"--checkpoint={snapshot}", f"--workdir={tmp_path / 'run'}") == cli.DONE
