"""What the system says of a disk or a network is no mistake of the user's."""

import errno
import os

import pytest

from maxsep.config import ConfigError, cli, faults


def raised(error: Exception, cause: Exception | None, quietly: bool = False) -> Exception:
    """The error as it is caught, raised from another one; `quietly`: from None, while that one is handled."""
    try:
        try:
            raise cause or ValueError("of no system call")
        except Exception as e:
            raise error from (None if quietly else e)
    except Exception as e:
        return e


def system(number: int) -> OSError:
    return OSError(number, os.strerror(number), "/disk/file")


@pytest.mark.parametrize("quietly", [True, False])
@pytest.mark.parametrize(
    "error, cause, status",
    [
        (ConfigError("data.path: cannot be read"), system(errno.EIO), cli.RESTART),
        (ConfigError("data.path: cannot be read"), system(errno.ESTALE), cli.RESTART),
        (ConfigError("data.path: cannot be read"), system(errno.ENOENT), cli.USER_ERROR),
        (ConfigError("data.path: cannot be read"), system(errno.EACCES), cli.USER_ERROR),
        (ConfigError("--workdir: cannot write"), system(errno.ENOSPC), cli.USER_ERROR),
        (ConfigError("--workdir: in use"), system(errno.EAGAIN), cli.USER_ERROR),
        (ConfigError("data.path: no JSON"), None, cli.USER_ERROR),
        (cli.Exit(cli.SAVE_FAILED, "not saved"), system(errno.ESTALE), cli.RESTART),
        (cli.Exit(cli.SAVE_FAILED, "not saved"), system(errno.ENOSPC), cli.SAVE_FAILED),
        (cli.Exit(cli.NONFINITE, "halted"), system(errno.EIO), cli.NONFINITE),
        (RuntimeError("read() failed: Input/output error; reading a"), None, cli.CRASHED),
        (ConfigError("data.path: a"), RuntimeError("read() failed: Input/output error; reading a"), cli.RESTART),
        (ConfigError("data.path: a"), ValueError("ABORTED: a [os_error_code='116']"), cli.RESTART),
    ],
)
def test_the_status_of_an_error(error, cause, status, quietly):
    assert cli.outcome(raised(error, cause, quietly)) == (
        status,
        f"{type(error).__name__}: {error}" if status == cli.CRASHED else str(error),
    )


def test_what_nobody_caught():
    assert cli.outcome(system(errno.EIO)) == (cli.RESTART, "[Errno 5] Input/output error: '/disk/file'")
    assert cli.outcome(system(errno.ENOENT))[0] == cli.CRASHED


@pytest.mark.parametrize("times, within", [(0, True), (3, True), (3, False)])
def test_retried(monkeypatch, times, within):
    monkeypatch.setattr(faults, "RETRY_SECONDS", 60.0 if within else 0.0)
    monkeypatch.setattr(faults, "PAUSES", (0.0 if within else 1.0, 0.0))
    left, told = [times], []

    def read():
        left[0] -= 1
        if left[0] >= 0:
            raise system(errno.EIO)
        return "read"

    if within:
        assert faults.retried(read, told=told.append) == "read" and len(told) == min(times, 1)
    else:
        with pytest.raises(OSError, match="Input/output"):
            faults.retried(read, told=told.append)
        assert not told and left == [times - 1]


@pytest.mark.parametrize("error", [system(errno.EACCES), ConfigError("another model")])
def test_what_is_final_is_not_retried(monkeypatch, error):
    monkeypatch.setattr(faults, "RETRY_SECONDS", 60.0)
    calls = []

    def read():
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        faults.retried(read, (ConfigError,))
    assert len(calls) == 1
