"""The exceptions of laasp_ray. Every message names the value, the place and what the user can do about it.

All of them carry a single message argument, so they survive pickling between Ray processes.
"""

_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "ALLOC_FAILED")


class LaaspError(Exception):
    """Base of everything that laasp_ray raises on purpose."""


class ConfigError(LaaspError):
    """A setting is unknown, out of range, or does not fit another; raised before anything expensive starts."""


class DataError(LaaspError):
    """The data set is missing, has an unexpected layout, or has too many unreadable images."""


class PruningError(LaaspError):
    """A layer cannot be pruned, or a plan does not fit the network it is applied to."""


class SearchError(LaaspError):
    """A candidate's loss could not be measured, or no candidate is left to choose."""


class MemoryShortError(SearchError):
    """Memory ran out in the search, again and again: the device's fault, or of who shares it, not a candidate's."""


class UnmaskedError(SearchError):
    """A prune that came without its plan cannot be masked by the process that was given it."""


class ExhaustedError(SearchError):
    """No layer has a filter left to give."""


class TrainingError(LaaspError):
    """Training could not go on; the message names the epoch and the last good checkpoint."""


class StoreError(LaaspError):
    """A run's folder cannot be read or written, or holds something else than expected."""


class ArtifactError(LaaspError):
    """A saved network cannot be rebuilt from its folder."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device; CPU allocators raise a RuntimeError of many words."""
    import torch  # whoever only names an error does without it

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def describe_error(error: BaseException) -> str:
    """The kind of an error and its first line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"
