"""What transformers computes with small models of its own is what the imported ones compute, on every layout.

golden/ has been written by make_golden.py: its numbers leave a gap at every choice, so float32 decides as torch does.
"""

import json

import kill
import numpy as np
import pytest
from conversion import GOLDEN, exported, imported, logits, on, tensors
from safetensors import safe_open

NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
SIZE = 300_000  # bytes of all of it


def facts(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The imported models, by name, each imported once."""
    folder, found = tmp_path_factory.mktemp("imported"), {}

    def run(name):
        if name not in found:
            found[name] = imported(GOLDEN / name, folder / name, "--config.model.dtype=float32")
        return found[name]

    return run


def test_the_golden_numbers_leave_no_choice_to_rounding():
    assert {name.partition("_")[0] for name in NAMES} == {"mixtral", "qwen3", "olmoe"}
    for name in NAMES:
        assert facts(name)["router_gap"] > 1e-5
        assert facts(name)["token_gap"] > 1e-3
        assert facts(name)["transformers"]
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < SIZE


FAST = [*((name, "ma", (1, 1)) for name in NAMES if name.endswith("odd")), ("mixtral_even", "ma", (4, 4))]
ALL = [(name, *at) for name in NAMES for at in (("ma", (1, 1)), ("ma", (4, 4)), ("tp", (4, 2)))]
SLOW = [case for case in ALL if case not in FAST and (case[0].endswith("even") or case[2] == (1, 1))]


@pytest.mark.parametrize(
    ("name", "layout", "mesh"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_logits_are_those_of_transformers(runs, name, layout, mesh):
    with safe_open(GOLDEN / f"{name}.safetensors", framework="numpy") as file:
        text, expected = file.get_tensor("text")[0], file.get_tensor("logits")
    folder = runs(name)
    found = logits(on(folder, layout, mesh, "float32"), folder, text)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


MESHES = {"ma": (1, 4, 4), "tp": (1, 4, 2), "zero": (2, 2, 4), "pp": (2, 1, 4), "tp_pp": (2, 2, 2)}


@pytest.mark.parametrize(
    "layout", [pytest.param(x, marks=[pytest.mark.slow] * (x not in ("ma", "zero"))) for x in MESHES]
)
@pytest.mark.parametrize("name", ["olmoe_even", pytest.param("mixtral_even", marks=pytest.mark.slow)])
def test_on_any_mesh_the_same_bits_are_stored(runs, tmp_path, name, layout):
    axes = zip(("stage", "attention", "expert"), MESHES[layout], strict=True)
    mesh = [f"--config.mesh.{axis}={size}" for axis, size in axes]
    run = imported(GOLDEN / name, tmp_path / "run", "--config.model.dtype=float32", f"--config.layout={layout}", *mesh)
    assert kill.state(run) == kill.state(runs(name))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "mixtral_odd")) for n in NAMES])
def test_greedy_tokens_are_those_of_generate(runs, complete, tmp_path, name):
    """64 of each prompt of a batch of different lengths, through infer.py."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"tokens": ids}) + "\n" for ids in facts(name)["prompts"]))
    how = ("--temperature=0", "--max_new_tokens=64", f"--json={out}")
    status, _, err = complete(f"--workdir={runs(name)}", f"--prompts={prompts}", *how)
    assert (status, err) == (0, "")
    assert [json.loads(line)["tokens"] for line in out.read_text().splitlines()] == facts(name)["new"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * n.startswith("qwen3")) for n in NAMES])
def test_exported_again_every_bit_is_the_original(runs, tmp_path, name):
    original = tensors(GOLDEN / name)
    dtype = next(iter(original.values())).dtype
    found = tensors(exported(runs(name), tmp_path / "model", f"--config.model.dtype={dtype.name}"))
    assert found.keys() == original.keys()
    for tensor, bits in original.items():
        assert found[tensor].dtype == bits.dtype and found[tensor].tobytes() == bits.tobytes(), tensor
