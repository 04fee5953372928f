"""What users can do wrong: each message gives the value found, the value needed, and the file or flag to change."""


class UserError(Exception):
    """Base of the errors that a program reports in one line, without a traceback."""


class ConfigError(UserError):
    """A setting, or a combination of settings, that cannot run."""


class LaunchError(UserError):
    """The processes, devices or rendezvous found at start do not fit the job."""


class LostContactError(LaunchError):
    """Another rank has not come, has died, or does not answer: a restart may help."""


class CorruptedStateError(UserError):
    """Copies of a run's state are no longer the same: those of `ranks`, as far as can be told. A restart mends it."""

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks


class DataError(UserError):
    """A dataset or text file is missing, truncated, foreign or inconsistent."""


class NumbersError(UserError):
    """Losses or gradients of a training that it must not go on with."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, damaged or of another model."""
