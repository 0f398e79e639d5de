"""What an address answers with, whole: a file of the page, or something drawn on request."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Content:
    """A body and how it is to be sent.

    Attributes:
        content_type: of HTTP.
        raw: the bytes.
        headers: further ones.
    """

    content_type: str
    raw: bytes
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
