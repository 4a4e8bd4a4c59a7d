"""The exception for every mistake that a user can make. The command line prints its text as one line."""


class UserError(ValueError):
    """The input is bad. The message is one line that names the file, tensor or value at fault."""
