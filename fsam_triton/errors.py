"""What a bad argument raises."""


class ArgumentError(ValueError):
    """An argument has a value that is not allowed.

    Attributes:
        name: The argument.
        value: The value received.
        allowed: What would be accepted.
    """

    def __init__(self, name: str, value: object, allowed: str):
        super().__init__(name, value, allowed)
        self.name = name
        self.value = value
        self.allowed = allowed

    def __str__(self) -> str:
        return f"Invalid {self.name}: {self.value!r}; {self.allowed}"


def check(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise the ArgumentError of a bad argument."""
    if not ok:
        raise ArgumentError(name, value, allowed)
