"""The exceptions of laasp_ray. Every message names the value, the place and what the user can do.

Each exception takes one message argument, so it can be pickled between Ray processes.
"""

_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "ALLOC_FAILED",
    "could not create a primitive",  # oneDNN, which says no more where it gets no memory
    "could not execute a primitive",
)


class LaaspError(Exception):
    """Base class of all errors that laasp_ray raises on purpose."""


class ConfigError(LaaspError):
    """A setting is unknown, out of range, or contradicts another one. Raised before anything expensive starts."""


class DataError(LaaspError):
    """The data set is missing, has an unexpected layout, or has too many unreadable images."""


class PruningError(LaaspError):
    """A layer cannot be pruned, or a plan does not fit the network it is applied to."""


class SearchError(LaaspError):
    """A candidate's loss could not be measured, or no candidate is left to choose."""


class MemoryShortError(SearchError):
    """Memory ran out repeatedly in the search. The cause is the device or another program on it, not a candidate."""


class UnmaskedError(SearchError):
    """A prune that was sent without its plan cannot be masked by the process that received it."""


class ExhaustedError(SearchError):
    """No layer has a filter left to prune."""


class TrainingError(LaaspError):
    """Training cannot continue. The message names the epoch and the last good checkpoint."""


class StoreError(LaaspError):
    """A run's folder cannot be read or written, or its content is not as expected."""


class ArtifactError(LaaspError):
    """A saved network cannot be rebuilt from its folder."""


class ExportError(LaaspError):
    """A network cannot be exported, or what was exported does not compute the same."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device. CPU allocators raise a RuntimeError with varying
    messages.
    """
    import torch  # a program that only uses these names does not need torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def describe_error(error: BaseException) -> str:
    """The kind of an error and its first line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"
