"""Errors a user can mend: the command line prints the message alone and exits with code 2."""


class UserError(Exception):
    """A wrong input. The message names the value, the rule it breaks and what to change.

    Attributes:
        is_told: another process of the run tells this error; this one only ends.
    """

    is_told = False
