"""What is known of the sub-networks that were used: which units, how much memory, how fast."""

import collections
import dataclasses
import threading
from typing import TypeVar

import mlx.nn as nn

from ifp_mlx.pictures.unit_map import Shares, UnitMap
from ifp_mlx.server.catalog import SubnetRequest
from ifp_mlx.server.routed_tokens import RoutedTokens
from ifp_mlx.subnets.subnetwork import SubNetwork
from ifp_mlx.units.modules import unit_shape
from ifp_mlx.units.routing import with_watched_experts

_Value = TypeVar("_Value")
_MAX_SEEN = 64  # a map takes a few bytes a unit: some megabytes for large models


@dataclasses.dataclass(frozen=True)
class SubnetFacts:
    """What is known of one sub-network.

    Attributes:
        units: which it keeps.
        is_mixture: the units are experts, among which a router chooses for each token.
        label: what people call the units.
        num_bytes: of its weights.
        whole_bytes: of the whole model's.
        selector: what chose the units.
    """

    units: UnitMap
    is_mixture: bool
    label: str
    num_bytes: int
    whole_bytes: int
    selector: str

    @classmethod
    def of(cls, subnet: SubNetwork) -> "SubnetFacts":
        """Return the facts of a sub-network. Evaluates, on the generation thread."""
        if subnet.selection is None:
            units = UnitMap.whole(subnet.kind.name, unit_shape(subnet.model))
        else:
            units = UnitMap.of(subnet.selection)
        return cls(
            units=units,
            is_mixture=subnet.kind.router is not None,
            label=subnet.kind.label,
            num_bytes=subnet.size.num_bytes,
            whole_bytes=subnet.source.num_bytes,
            selector=str(subnet.selector),
        )


class SeenSubnets:
    """Facts of the sub-networks that were used lately, for any thread."""

    def __init__(self) -> None:
        self._facts: collections.OrderedDict[SubnetRequest, SubnetFacts] = collections.OrderedDict()
        self._speeds: collections.OrderedDict[SubnetRequest, float] = collections.OrderedDict()
        self._routed: collections.OrderedDict[SubnetRequest, RoutedTokens]
        self._routed = collections.OrderedDict()
        self._lock = threading.Lock()

    def add(self, request: SubnetRequest, subnet: SubNetwork) -> None:
        """Note a sub-network; called on the generation thread."""
        if self.get(request) is None:
            facts = SubnetFacts.of(subnet)
            with self._lock:
                _put(self._facts, request, facts)

    def get(self, request: SubnetRequest) -> SubnetFacts | None:
        """Return what is known of a sub-network, None if it was not used lately."""
        with self._lock:
            if request in self._facts:
                self._facts.move_to_end(request)
            return self._facts.get(request)

    def watched(self, request: SubnetRequest, subnet: SubNetwork) -> nn.Module:
        """Return the model of a sub-network; that of a mixture shows where it sends tokens."""
        if subnet.kind.router is None or subnet.reader is not None:
            return subnet.answering
        with self._lock:
            routed = self._routed.get(request)
            if routed is None:
                routed = RoutedTokens(len(unit_shape(subnet.model).layers), subnet.num_kept_units)
            _put(self._routed, request, routed)
        return with_watched_experts(subnet.model, routed.watch)

    def routed(self, request: SubnetRequest) -> Shares | None:
        """Return the (L, K) shares of the latest tokens that a mixture sent to each expert.

        None where no token of an answer was seen.
        """
        with self._lock:
            routed = self._routed.get(request)
        return None if routed is None else routed.shares

    def note_speed(self, request: SubnetRequest, tokens_per_s: float) -> None:
        """Note how fast an answer came."""
        with self._lock:
            _put(self._speeds, request, tokens_per_s)

    def speed(self, request: SubnetRequest) -> float | None:
        """Return how fast its latest answer came, in tokens a second; None before one."""
        with self._lock:
            return self._speeds.get(request)


def _put(
    known: "collections.OrderedDict[SubnetRequest, _Value]", key: SubnetRequest, value: _Value
) -> None:
    known[key] = value
    known.move_to_end(key)
    while len(known) > _MAX_SEEN:
        known.popitem(last=False)
