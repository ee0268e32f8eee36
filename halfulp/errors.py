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
