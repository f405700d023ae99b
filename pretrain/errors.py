"""What a user can do wrong, as a family of exceptions.

    PretrainError
    ├── Stopped                 exit 75: stopped by a signal before the end, all is saved; start again to continue
    └── UserError               exit 2, no traceback: what, where, found, what to do
        ├── ConfigError         a setting is unknown, malformed or contradicts another
        ├── CorpusError         text that is missing, empty or not what the recipe says
        ├── TokenizerError      a vocabulary that cannot be trained, opened or used
        ├── ShardError          token files that are missing, damaged or of another tokenizer
        ├── ResumeError         a run that may not continue from what it finds
        ├── ExportError         a checkpoint that cannot be handed over as asked
        └── TaskError           a fine-tuning task that cannot be read or trained

Everything else that escapes is a fault of ours: a traceback and exit 1.
"""


class PretrainError(Exception):
    exit_code = 1


class Stopped(PretrainError):
    """A run was asked to stop and has saved where it stands; the message was printed when it stopped."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class UserError(PretrainError):
    """A user's mistake. `what` is one line; `details` say where, what was found and what to do, one line each."""

    exit_code = 2

    def __init__(self, what: str, *details: str):
        self.what, self.details = what, details
        super().__init__("\n  ".join((what, *details)))


class ConfigError(UserError):
    pass


class CorpusError(UserError):
    pass


class TokenizerError(UserError):
    pass


class ShardError(UserError):
    pass


class ResumeError(UserError):
    pass


class ExportError(UserError):
    pass


class TaskError(UserError):
    pass
