"""What users can do wrong: each message gives the value found, the value needed, and the file or flag to change."""


class UserError(Exception):
    """Base of the errors that a program reports in one line, without a traceback."""


class ConfigError(UserError):
    """A setting, or a combination of settings, that cannot run."""


class LaunchError(UserError):
    """The processes, devices or rendezvous found at start do not fit the job."""


class LostContactError(LaunchError):
    """Another rank has not come, has died, or does not answer: a restart may help."""


class DataError(UserError):
    """A dataset or text file is missing, truncated, foreign or inconsistent."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, damaged or of another model."""
