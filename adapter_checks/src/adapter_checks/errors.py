"""The one error that these checks raise on purpose."""


class InputError(Exception):
    """Something that a person can put right; the message says what is wrong and what to do."""
