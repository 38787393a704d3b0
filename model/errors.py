"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """An error a user caused and can mend: one clear sentence saying what is wrong, where, and what to do.

    The command line prints the sentence and exits with status 2; the server answers with a 4xx and the sentence.
    """


class GraphError(UserError):
    """A graph could not be exported, gave wrong numbers or was refused by TensorRT: one sentence naming the graph."""


def first_line(error: BaseException) -> str:
    """What an exception says, on one line without a full stop at the end, or its type when it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
