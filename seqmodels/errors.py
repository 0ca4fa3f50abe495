"""Everything that can go wrong because of something a user did.

    SeqModelsError
    ├── ConfigError           a recipe, a model config or a command line is wrong
    ├── InputError            one request is wrong; carries `param` and `code` for the HTTP answer
    │   ├── TooLongError      the input does not fit the model (413)
    │   ├── UnsupportedError  the input is of a kind this model does not take (415)
    │   └── NotFiniteError    the model's numbers grow beyond all bounds for this input
    ├── ModelDirectoryError   a saved model cannot be loaded
    ├── DataError             a data set lacks a split, a column or labels
    ├── CheckpointError       a run cannot be resumed
    ├── QueueFullError        no room for another request now (429)
    └── DeadlineError         a request's time was over before its answer was ready (408)

Each message names the field, the value and the fix. Nothing else is raised on purpose, so any other exception
is a bug of ours.
"""


class SeqModelsError(Exception):
    """Base of every error that is the user's to mend."""


class ConfigError(SeqModelsError):
    """A recipe, a model config or a command line is wrong."""


class InputError(SeqModelsError):
    """One request is wrong.

    `param` is the request field at fault, such as `inputs[3]`; `code` is a fixed word that programs can test.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class TooLongError(InputError):
    """The input has more text, frames or steps than the model takes."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, code="too_long")


class UnsupportedError(InputError):
    """The input is of a kind, or in a format, that this model does not take."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, code="unsupported_input")


class NotFiniteError(InputError):
    """The model's numbers grow beyond all bounds for this input, so it has no answer."""

    def __init__(self) -> None:
        super().__init__("the model's scores for this input are not finite; its numbers are too large for it")


class ModelDirectoryError(SeqModelsError):
    """A saved model cannot be loaded; the message names the file and the field."""


class DataError(SeqModelsError):
    """A data set lacks a split, a column or labels."""


class CheckpointError(SeqModelsError):
    """A run cannot be resumed from what its directory holds."""


class QueueFullError(SeqModelsError):
    """No room for another request now; try again after so many seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def hopeless(seconds: float) -> QueueFullError:
    """For a request that still waits for its turn, and has less time left than it would take from then on."""
    return QueueFullError(
        f"an answer would take another {seconds:.1f} s, and this request cannot wait so long; try again later, or "
        "allow more time",
        seconds,
    )


class DeadlineError(SeqModelsError):
    """A request's time was over before its answer was ready."""
