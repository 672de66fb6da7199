"""The one error that means "the user can mend this": its message is one clear line."""


class UserError(ValueError):
    """A mistake in an input, a file or a configuration.

    The message is a single line that names the file, the key or the tensor and says how to mend it.
    The command line prints it without a traceback. This module imports nothing, so every package may use it.
    """
