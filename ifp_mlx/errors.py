"""Every error that this package raises on purpose.

    IFPError
    ├── UsageError            the call itself is wrong: a value out of range, an empty prompt
    ├── ConfigError           a configuration file or dataclass that does not fit
    ├── CheckpointError       a checkpoint directory that cannot be read or is damaged
    │   └── ArchitectureError a model family that the FFN table does not know
    ├── SelectionError        indices or scores that do not fit the model
    ├── AdapterError          an IFP adapter that is damaged or made for another model
    ├── CacheError            a sub-network cache that cannot be read or written
    ├── SessionError          a saved chat that cannot be read or written
    ├── DataError             training or evaluation text that cannot be used
    ├── TrainingError         a training run that had to stop
    ├── ResourceError         not enough memory or disk
    └── DownloadError         a file that could not be fetched or verified

Each message is one line that says what is wrong and what to do. The command line prints
it on stderr and exits with 1, or with 2 for ``UsageError``.
"""


class IFPError(Exception):
    """Base class: one clear line for the user."""


class UsageError(IFPError):
    """The call is wrong: a value out of range, an empty prompt, options that exclude each other."""


class ConfigError(IFPError):
    """A configuration that does not fit: unknown keys, wrong types, missing values."""


class CheckpointError(IFPError):
    """A checkpoint that cannot be read, is damaged or is not safe to read."""


class ArchitectureError(CheckpointError):
    """A model family whose FFN this package does not know."""


class SelectionError(IFPError):
    """Scores or indices that do not fit the model they are meant for."""


class AdapterError(IFPError):
    """An IFP adapter that is damaged or was made for another model."""


class CacheError(IFPError):
    """A sub-network cache that cannot be read or written."""


class SessionError(IFPError):
    """A saved chat session that cannot be read or written."""


class DataError(IFPError):
    """Training, calibration or evaluation text that cannot be used."""


class TrainingError(IFPError):
    """A training run that had to stop: not-a-number, collapsed masks, no examples left."""


class ResourceError(IFPError):
    """Not enough memory or disk for what was asked."""


class DownloadError(IFPError):
    """A file that could not be fetched, or whose content is not what was pinned."""
