"""What lies in the folder of a run of several processes, where one sees it otherwise, and where another job comes."""

import kill
import processes
import pytest
from runs import SMALL, checkpoints, steps

from maxsep.config import cli

WIDE = SMALL | {"mesh__attention": 2, "mesh__expert": 2, "train__checkpoint_every": 2}

pytestmark = pytest.mark.slow


def test_a_checkpoint_that_is_damaged_for_one_process_is_taken_by_none(workdir, data):
    assert processes.train(workdir, 2, *kill.flags(data, **WIDE))
    whole = kill.state(workdir), kill.figures(workdir)
    fault = (1, "damaged", "read", "4")
    with processes.Processes(workdir, 2, *kill.flags(data, **WIDE), fault=fault) as both:
        assert both.ended() == [0, 0], both.all_printed()
        printed = both.printed()
    assert f"warning: checkpoint of step 4 in {workdir}/checkpoints is damaged: planted (process 1 (" in printed
    assert f"resuming from step 2 in {workdir}" in printed
    assert (kill.state(workdir), kill.figures(workdir)) == whole


def test_a_job_holds_its_folder_until_all_have_ended(workdir, data):
    flags = kill.flags(data, **WIDE | {"train__steps": 100_000, "train__checkpoint_every": 0})
    with processes.Processes(workdir, 2, *flags) as both:
        both.reach("step ")
        second = kill.Process(workdir, *flags)
        assert second.ended() == cli.USER_ERROR
        assert f"error: --workdir: {workdir} is in use by process {both.children[0].pid} on" in second.printed[-1]
        both.children[1].terminate()
        assert both.ended() == [cli.STOPPED, cli.STOPPED], both.all_printed()
    (step,) = checkpoints(workdir)
    assert steps(workdir, "train")[-1] == step
