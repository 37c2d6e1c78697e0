"""Ties that have to be folded together, because a parameter has but one compact one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tieopt.ties.places import BoundTie, ParamGroups, Place, parameter_at
from tieopt.ties.slices import FREE, Slices, told_apart


def components(ties: Sequence[BoundTie], param_groups: ParamGroups) -> list[BoundTie]:
    """Ties that have a parameter in common, or join some, as one."""
    sets: dict[Place, list[BoundTie]] = {}
    for tie in ties:
        met = {id(own): own for place in tie.places if (own := sets.get(place)) is not None}
        united = [*(each for own in met.values() for each in own), tie]
        sets.update((place, united) for each in united for place in each.places)
    return [_component(own, param_groups) for own in {id(own): own for own in sets.values()}.values()]


def _component(ties: Sequence[BoundTie], param_groups: ParamGroups) -> BoundTie:
    kinds: dict[Place, set[tuple[int, torch.Size]]] = {}
    for tie in ties:
        for place, each in zip(tie.places, tie.slices, strict=True):
            kinds.setdefault(place, set()).add((each.dim, each.labels.shape))
    slices = [list(tie.slices) for tie in ties]
    # What is tied in slices of several kinds is tied entry by entry.
    if any(len(own) > 1 for own in kinds.values()):
        params = [[parameter_at(param_groups, place) for place in tie.places] for tie in ties]
        # Before they are told apart: a group of slices is as many groups as a slice has entries.
        slices = [
            [Slices(*each.entries(param)) for each, param in zip(*both, strict=True)]
            for both in zip(slices, params, strict=True)
        ]
    parts: dict[Place, list[Slices]] = {}
    for tie, own in zip(ties, told_apart(slices), strict=True):
        for place, each in zip(tie.places, own, strict=True):
            parts.setdefault(place, []).append(each)
    return BoundTie(list(parts), [_overlaid(own) for own in parts.values()])


def _overlaid(slices: Sequence[Slices]) -> Slices:
    """Several labellings of the same slices, which share none, as one."""
    labels, scale = slices[0].labels, slices[0].scales
    for each in slices[1:]:
        labels, scale = torch.maximum(labels, each.labels), torch.where(each.labels == FREE, scale, each.scales)
    scaled = any(each.scale is not None for each in slices)
    return Slices(labels, torch.where(labels == FREE, 1.0, scale) if scaled else None, slices[0].dim)
