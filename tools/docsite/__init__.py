"""The site of ``./tools/docs``: pages from the repository, the command line and the docstrings."""
