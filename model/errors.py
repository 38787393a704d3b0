"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """An error a user caused and can mend: one clear sentence saying what is wrong, where, and what to do.

    The command line prints the sentence and exits with status 2; the server answers with a 4xx and the sentence.
    """
