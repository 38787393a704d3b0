"""What an operator's arguments must fit: checked when a graph is traced, where a kernel would read past an end."""


def require(fits: bool, sentence: str) -> None:
    """Raise ValueError(sentence) unless `fits`. Sizes may be symbolic: the comparison then becomes a guard."""
    if not fits:
        raise ValueError(sentence)
