"""Checks that configurations make of their values."""


def at_least(least: int | float, **values: int | float | tuple[int, ...]) -> None:
    """Raise `ValueError` naming the first value, or element, below `least`; `__` reads as a dot."""
    for name, value in values.items():
        if any(each < least for each in (value if isinstance(value, tuple) else (value,))):
            key = name.replace("__", ".")
            raise ValueError(f"{key} must be at least {least:g}, got {value}")


def one_of(choices: tuple[str, ...], **values: str) -> None:
    """Raise `ValueError` naming the first value that is none of `choices`."""
    for name, value in values.items():
        if value not in choices:
            key = name.replace("__", ".")
            raise ValueError(f"{key} must be one of {', '.join(choices)}, got {value!r}")
