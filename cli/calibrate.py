"""``ifp calibrate``."""


def calibrate() -> None:
    """Measure a model's units on text."""
