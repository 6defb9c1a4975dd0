"""The error tree: every mistake a user can make is one of these, printed as one line.

VLMError                 exit code
├── InputError               2      bad input or usage
│   ├── CheckpointError             a folder, config or tensor that cannot be a checkpoint
│   ├── ImageError                  not a picture, or one that is too large
│   ├── PromptError                 prompt and images do not fit each other, or the context
│   ├── RecipeError                 a precision that does not exist or that a target cannot take
│   └── BundleError                 a bundle that is damaged, incomplete or of another model
├── CheckError               1      parity or another check failed
└── DependencyError          3      a needed SDK or device is missing
"""


class VLMError(Exception):
    """Base of all errors meant for the user: `str(error)` is one line that says what to do."""

    exit_code = 2


class InputError(VLMError):
    """Bad input or usage."""


class CheckpointError(InputError):
    """A folder, config or tensor that cannot be read as a checkpoint."""


class ImageError(InputError):
    """Not a picture that can be decoded, or one larger than allowed."""


class PromptError(InputError):
    """The prompt does not fit the images or the context."""


class RecipeError(InputError):
    """A precision that does not exist, or that a target cannot take."""


class BundleError(InputError):
    """A bundle that is damaged, incomplete or made of parts of another model."""


class CheckError(VLMError):
    """A parity threshold was missed."""

    exit_code = 1


class DependencyError(VLMError):
    """An SDK or a device that this command needs is missing."""

    exit_code = 3
