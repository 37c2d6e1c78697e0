"""Ties that are folded together, because a parameter has one compact parameter for all of its ties."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tieopt.ties.offsets import Offset
from tieopt.ties.options import Options
from tieopt.ties.places import BoundTie, Place
from tieopt.ties.slices import FREE, Slices, are_scaled, has_shared_values, of_one_kind


def components(ties: Sequence[BoundTie]) -> list[BoundTie]:
    """Return ties that have each parameter once: ties that have one in common, or join some, as one."""
    component_of: dict[Place, list[BoundTie]] = {}
    for tie in ties:
        touched = {id(known): known for place in tie.places if (known := component_of.get(place)) is not None}
        united = [*(other for known in touched.values() for other in known), tie]
        component_of.update((place, united) for other in united for place in other.places)
    distinct = {id(component): component for component in component_of.values()}
    return [_as_one(component) for component in distinct.values()]


def _as_one(ties: Sequence[BoundTie]) -> BoundTie:
    if len(ties) == 1 and len(set(ties[0].places)) == len(ties[0].places):
        return ties[0]
    keyed = [list(zip(tie.places, tie.slices, strict=True)) for tie in ties]
    by_place: dict[Place, list[Slices]] = {}
    for place, slices in of_one_kind(keyed, lambda place: place.shape):
        by_place.setdefault(place, []).append(slices)
    overlaid = [_overlaid(several) for several in by_place.values()]
    return BoundTie(list(by_place), overlaid, options=_common_options(ties))


def _common_options(ties: Sequence[BoundTie]) -> Options:
    """Return the options of ties; without a reduction if those with shared values have several."""
    options = {tie.options for tie in ties if has_shared_values(tie.slices)} or {ties[0].options}
    return next(iter(options)) if len(options) == 1 else ties[0].options._replace(reduction=None)


def _overlaid(layers: Sequence[Slices]) -> Slices:
    """Return several labellings of the same slices, of which each has at most one label, as one."""
    labels, scale, dim = layers[0].labels, layers[0].scales, layers[0].dim
    for layer in layers[1:]:
        above = layer.labels != FREE
        labels, scale = torch.maximum(labels, layer.labels), torch.where(above, layer.scales, scale)
    scaled = are_scaled(layers)
    offset = Offset.overlaid([(layer.labels != FREE, layer.offset) for layer in layers])
    return Slices(labels, torch.where(labels == FREE, 1.0, scale) if scaled else None, dim, offset)
