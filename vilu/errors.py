"""Exceptions with a message for the user. The command line prints the text as one line."""


class UserError(ValueError):
    """The input is bad. The message is one line that names the file, tensor or value at fault.

    exit_code: exit code of a command that ends with this error.
    """

    exit_code = 2


class FailedError(UserError):
    """What was asked for failed, although the input may be good: no server answers, or a target cannot be met."""

    exit_code = 1
