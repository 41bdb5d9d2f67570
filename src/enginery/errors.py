"""Every error that Enginery raises on purpose.

    EngineryError
    ├── UsageError                 exit 2   the caller asked for something that cannot be
    │   └── RequestError                    one request is invalid; the engine lives on
    ├── CorruptError               exit 3   input on disk is not what it claims to be
    │   ├── CheckpointError                 a model directory or one of its files
    │   ├── UnsupportedError                readable, but a construct is not supported; says which
    │   ├── NetworkError                    a network's text or structure is invalid
    │   └── EngineFileError                 an engine directory
    ├── ResourceError              exit 4   memory, disk or device is too small
    │   └── QueueFullError                  too many requests are waiting; try again later
    └── EngineError                exit 5   a build or a step failed
        ├── BuildError
        ├── RewriteError                    carries .rule and .layer
        │   └── RewriteLimitError           rules keep firing
        └── StepError                       one step of an engine failed
            └── DeviceError                 the GPU is lost; the engine runs no further step

The text of an error is one line: the cause, then the fix with the flag that applies it.
"""

from __future__ import annotations


class EngineryError(Exception):
    """Base of all errors; `exit_code` is what the command line ends with."""

    exit_code = 5

    def __init__(self, cause: str, fix: str = "") -> None:
        self.cause = cause.rstrip(".")
        self.fix = fix
        super().__init__(f"{self.cause}. {fix}" if fix else self.cause)


class UsageError(EngineryError):
    exit_code = 2


class RequestError(UsageError):
    pass


class CorruptError(EngineryError):
    exit_code = 3


class CheckpointError(CorruptError):
    pass


class UnsupportedError(CorruptError):
    pass


class NetworkError(CorruptError):
    pass


class EngineFileError(CorruptError):
    pass


class ResourceError(EngineryError):
    exit_code = 4


class QueueFullError(ResourceError):
    pass


class EngineError(EngineryError):
    exit_code = 5


class BuildError(EngineError):
    pass


class RewriteError(EngineError):
    """A rule broke its contract. The network is as it was before that rule."""

    def __init__(self, cause: str, fix: str = "", *, rule: str = "", layer: str = "") -> None:
        self.rule = rule
        self.layer = layer
        super().__init__(cause, fix)


class RewriteLimitError(RewriteError):
    pass


class StepError(EngineError):
    pass


class DeviceError(StepError):
    """Every later call of this process to the device fails, too."""


class EngineryWarning(RuntimeWarning):
    """The work goes on, slower than it could, or perhaps not as it was meant."""


RULE_ERRORS = (Exception, SystemExit)
"""what a rule of a user is caught with: one that calls sys.exit() must not end the command without a word"""


def in_one_line(error: BaseException) -> str:
    """What an error of a user's code says, for the text of ours: `ValueError: no such head`."""
    text = error.cause if isinstance(error, EngineryError) else str(error)
    line = next(iter(text.strip().splitlines()), "")
    return line if isinstance(error, EngineryError) else f"{type(error).__name__}: {line}".removesuffix(": ")
