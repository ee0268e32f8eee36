"""What a user did wrong, or what a machine cannot do, as messages that say what to do about it."""

import importlib
from types import ModuleType


class HalfulpError(Exception):
    """Root of every error whose message is an answer; the CLI prints it and exits with its code."""

    exit_code = 2


class CheckError(HalfulpError):
    """A model, batch or target that cannot be priced, measured or judged."""


class ConfigError(HalfulpError):
    """A configuration value that cannot be used."""


class DataError(HalfulpError):
    """A corpus, tokenizer or token file that cannot be used."""


class FormatError(HalfulpError):
    """A number format, rounding, scaling or quantizer that does not exist or does not fit."""


class KernelError(HalfulpError):
    """A kernel that was asked for and cannot be used on this machine."""


class MissingExtraError(HalfulpError):
    """An optional dependency that is not installed."""


class NonFiniteError(HalfulpError):
    """A loss, gradient or batch that is not finite."""


class PlanError(HalfulpError):
    """A budget, scaling law or corpus size that cannot be planned with."""


class NothingLeftError(DataError):
    """A corpus of which nothing can be read."""

    exit_code = 3


class PolicyError(HalfulpError):
    """A policy, rule, recipe or block map that does not decide every GEMM."""


class RunError(HalfulpError):
    """A run directory that cannot be created, read or resumed."""


class StoppedError(HalfulpError):
    """A run that the guard has stopped, because nothing that it may do has helped."""


def lack(error: BaseException) -> str | None:
    """What the machine lacks, as an answer; None if `error` is neither of memory nor of files."""
    if isinstance(error, OSError) and error.strerror:
        return (
            f"{error.filename or 'a file'}: {error.strerror}. Check that it is there, that this "
            "user may use it and that the disk has room."
        )
    memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if memory or "allocate memory" in str(error):
        why = str(error).partition("\n")[0] or "no more can be had"
        return (
            f"memory ran out: {why}. Give a smaller model, fewer sequences at a time (train.rows; "
            "train.accumulate makes up for them) or shorter ones (data.length). A run that has "
            "begun keeps its checkpoints."
        )
    return None


def require(module: str, extra: str) -> ModuleType:
    """Import the optional `module`.

    Raises MissingExtraError naming the extra that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module} is needed here and is not installed ({error}). "
            f"Install it with: pip install 'halfulp[{extra}]'"
        ) from error
