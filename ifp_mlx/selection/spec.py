"""What a user calls a selector: a name, and what may follow it after a colon."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class SelectorSpec:
    """The name of a selector and its argument: ``blend``, ``static:coding``.

    Attributes:
        name: a name in the registry (``subnets.selectors``), or any word for a selection that
            comes from elsewhere.
        argument: which of its kind; None for the ordinary one.
    """

    name: str
    argument: str | None = None

    @classmethod
    def parse(cls, text: str) -> "SelectorSpec":
        """Return what ``NAME`` or ``NAME:ARGUMENT`` says."""
        name, _, argument = text.partition(":")
        return cls(name, argument or None)

    def __str__(self) -> str:
        """Return the text that ``parse`` reads."""
        return self.name if self.argument is None else f"{self.name}:{self.argument}"
