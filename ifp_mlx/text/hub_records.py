"""Records of data sets on the Hugging Face hub, read as a stream; needs the ``datasets`` extra."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ifp_mlx.errors import DataError, UsageError

PREFIX = "hub:"
"""Where a file is named, ``hub:OWNER/NAME[:SPLIT]`` names a data set of the hub instead."""


@dataclasses.dataclass(frozen=True)
class HubSource:
    """A data set of the hub.

    Attributes:
        name: OWNER/NAME.
        split: ``train`` where none is named.
    """

    name: str
    split: str

    @classmethod
    def parse(cls, path: Path) -> "HubSource | None":
        """Return what ``hub:OWNER/NAME[:SPLIT]`` says, or None for a local file.

        Raises:
            UsageError: it begins like one and says something else.
        """
        text = str(path)
        if not text.startswith(PREFIX):
            return None
        name, _, split = text.removeprefix(PREFIX).partition(":")
        if name.count("/") != 1 or not all(name.split("/")):
            raise UsageError(
                f"{text!r} is no data set; write hub:OWNER/NAME or hub:OWNER/NAME:SPLIT"
            )
        return cls(name, split or "train")

    @property
    def domain(self) -> str:
        """The data set's name without its owner."""
        return self.name.split("/")[1]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows in order, fetched as they are needed.

        Raises:
            UsageError: ``datasets`` is not installed.
            DataError: there is no such data set or split, or it cannot be fetched.
        """
        try:
            import datasets
        except ImportError:
            raise UsageError(
                "data sets of the hub need the datasets library: pip install 'ifp-mlx[datasets]'"
            ) from None
        try:
            for row in datasets.load_dataset(self.name, split=self.split, streaming=True):
                yield dict(row)
        except Exception as error:
            # The library raises errors of its own, of fsspec, of httpx and of pyarrow.
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{PREFIX}{self.name}:{self.split} cannot be read: {reason}") from error
