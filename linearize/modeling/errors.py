"""The exceptions a user can meet, each one line: the place, the value found, what to do.

    LinearizeError
    ├── RecipeError        a recipe key, an override, a command-line word
    ├── TeacherError       the model to convert cannot be found, read or used
    ├── ConversionError    a family, layer or method that cannot be converted
    ├── DataError          training or evaluation text
    ├── TrainingError      a stage that cannot start, resume or go on
    ├── EvaluationError    a measurement that cannot be made
    ├── CheckpointError    a saved student that cannot be written or read
    └── HubError           an upload or download

The command line prints the line and exits with code 2. ``assert`` guards our own invariants only.
"""


class LinearizeError(Exception):
    """A mistake that the user can mend; the message is one line with place, value and remedy."""


class RecipeError(LinearizeError):
    """A recipe, an override or a command-line word that cannot be honoured."""


class TeacherError(LinearizeError):
    """A model that cannot be found, read or used as a teacher."""


class ConversionError(LinearizeError):
    """A family, layer or method that cannot be converted."""


class DataError(LinearizeError):
    """Training or evaluation text that is missing, unreadable or too short."""


class TrainingError(LinearizeError):
    """A stage that cannot start, resume or go on."""


class EvaluationError(LinearizeError):
    """A measurement that cannot be made."""


class CheckpointError(LinearizeError):
    """A saved student that cannot be written or read."""


class HubError(LinearizeError):
    """An upload or a download that failed."""
