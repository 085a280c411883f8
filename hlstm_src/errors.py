"""Errors that a user can mend: the command line shows their message, not a traceback."""


class UserError(Exception):
    """The message names what is wrong, where, and what to do."""
    exit_code = 1
