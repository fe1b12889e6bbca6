"""The state's bytes on a device: those that its arrays have there."""

import jax
import pytest
from abstract import abstract
from programs import run
from small import config, named

from maxsep.config import ConfigError
from maxsep.measure import memory
from maxsep.measure.memory import bytes_on_device, of_state


@pytest.mark.parametrize(
    ("layout", "mesh", "zero1"),
    [
        ("ma", (4, 4), True),
        pytest.param("tp", (8, 2), False, marks=pytest.mark.slow),
        pytest.param("zero", (2, 2, 4), False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_bytes_are_those_of_the_devices_shards(layout, mesh, zero1):
    c = config(mesh, layout, optimizer={"zero1": zero1})
    r = run(c)
    with jax.set_mesh(r.mesh):
        state = r.new_state()
    for kind, tree in (("weights", state.params), ("optimizer", state.optimizer)):
        shards = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
        assert of_state(r.abstract_state)[kind] == of_state(abstract(c).state)[kind] == shards, named(mesh)
    assert of_state(r.abstract_state)["gradients"] == bytes_on_device(state.params)


def test_a_program_that_a_device_has_no_memory_for_is_refused(monkeypatch):
    class Device:
        device_kind = "NVIDIA H200"

        def __init__(self, limit):
            self.limit = limit

        def memory_stats(self):
            return {"bytes_limit": self.limit}

    lowered = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((1000,), "float32"))
    memory.fitting(lowered, "the step", "less")  # simulated devices share the machine's
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(9000), Device(8000)])
    memory.fitting(lowered, "the step", "less")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(9000), Device(7999)])
    with pytest.raises(ConfigError, match=r"^memory: got 0.0 GB per device for the step, where XLA may take"):
        memory.fitting(lowered, "the step", f"less than {memory.plan_command()}")
    assert memory.plan_command() == "`python -m maxsep.plan --config=FILE --cluster=h200:1x2`"
