"""What goes wrong with other people's files."""


class InteropError(ValueError):
    """A file that cannot be read, or a network that another system has no word for; one line with the remedy."""
