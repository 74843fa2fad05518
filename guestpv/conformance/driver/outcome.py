"""What comes of an exercise."""


class Broken(Exception):
    """The driver gave its user something wrong."""
