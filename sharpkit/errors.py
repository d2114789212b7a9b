"""The errors that sharpkit raises for input it cannot use.

Every one says what was found, where, and what was expected. Catch `SharpkitError` for all of them.
"""


class SharpkitError(Exception):
    """Base of every error that a user's input can cause."""


class ZooFormatError(SharpkitError):
    """A file or directory of a zoo is missing, corrupt, or not in the expected layout."""


class ModelError(SharpkitError):
    """A model, its weights or its loss cannot be measured (NaN, wrong shape, no gradient)."""


class DivergedError(ModelError):
    """Training has reached a loss or weights that are NaN or infinite."""


class DataError(SharpkitError):
    """The examples or labels given do not fit the model, the loss or the request."""


class ArgumentError(SharpkitError, ValueError):
    """An argument is outside its allowed range."""


class ScoreError(SharpkitError):
    """A measure cannot be scored (missing predictions, unusable hyperparameter grid)."""


class RunError(SharpkitError):
    """A run directory cannot be used (other configuration, other driver, damaged store)."""


class RankError(SharpkitError):
    """Processes that measure together cannot go on: one failed or has ended, or they differ."""


class DownloadError(SharpkitError):
    """An archive could not be downloaded or unpacked safely."""


def first_sentence(error: BaseException) -> str:
    """The first sentence of somebody else's error, for one of ours.

    Example:
        >>> first_sentence(ValueError("no such layer. See the manual.")), first_sentence(KeyError())
        ('no such layer', 'KeyError')
    """
    text = str(error).strip()
    if not text:
        return type(error).__name__
    sentence = text.splitlines()[0].split(". ")[0]
    return sentence if len(sentence) <= 200 else f"{sentence[:197]}..."
