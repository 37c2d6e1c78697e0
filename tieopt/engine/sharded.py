"""Ties of sharded parameters: the same reduction over the shards that several ranks have.

Slices of a :class:`~torch.distributed.tensor.DTensor` are where its placements put them. Groups that are whole on one
rank are tied there, as if its shard were all there is; the members of the others are first added up on each rank, and
their means are exchanged, see :mod:`~tieopt.engine.exchange`. Ties of rows whose entries are sharded, and not the rows,
exchange nothing.

All ranks of the mesh have to take part in whatever ties, in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from tieopt.engine.agreement import agree
from tieopt.engine.exchange import Exchange, Plan, plan_exchange
from tieopt.engine.planning import Peers, plan_together
from tieopt.errors import refusal
from tieopt.numbers.index import Index, Layout, Views
from tieopt.numbers.reduction import Operation, Workspace, drift, project_, relax_, tied
from tieopt.numbers.start import start_from_first_
from tieopt.tensors import (
    bounds_of,
    calculable,
    check_sharding,
    has_shape,
    is_sharded,
    local,
    raw_bytes,
    real,
    shard_of,
    sharding_of,
    sharding_of_slices,
    wide_dtype,
)
from tieopt.ties.offsets import Offset
from tieopt.ties.slices import FREE, Partition, Slices, Totals, described, numbered, with_labels

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    from tieopt.ties.across import Across


class Shards:
    """A tie of sharded tensors, or of tensors of several ranks, as this rank sees it.

    Args:
        tie: of the tensors.
        tensors: which say how they are sharded.

    Raises:
        ValueError: they are not sharded alike, ranks have different ties, or a group that spans ranks has scales that
            round.
    """

    def __init__(self, tie: Partition, tensors: Sequence[Any]) -> None:
        self._across = tie.across
        self._mesh = _common_mesh(tie, tensors) if any(map(is_sharded, tensors)) else None
        self._compiled: dict[Layout, tuple[Index, Exchange | None]] = {}
        _check_still_sharded(tie, tensors)
        slices: Sequence[Slices] = tie.slices
        if self._across is not None:
            slices, self.members_across = _labelled_alike(self._across, slices, tensors)
        if self._mesh is None:
            view = _View(slices, slices, [_labels_of_members(slices)], 0, None)
        else:
            view = _view_on_mesh(self._mesh, tie, slices, tensors)
        if self._across is not None:
            view = _view_across(self._across, tie, tensors, view)
        if view.peers is not None:
            plan, count, self.members_across, self.totals = plan_together(view.here[0].labels, view.peers)
            _check_replicas(tie, tensors[0], self.totals)
        else:
            plan, spanning = plan_exchange(view.members, view.rank)
            _check_scales(view.slices, spanning, tie.names)
            if not tie.is_linear:
                _check_offsets(view.slices, spanning, tie.names)
            count = len(spanning)
        self._plan = plan if count else None
        self._process_group = view.process_group
        sent = [rows_sent(part, plan) for part in view.here]
        others = [part.labels.masked_fill(rows != FREE, FREE) for part, rows in zip(view.here, sent, strict=True)]
        self._spanning, self._whole = with_labels(view.here, sent), numbered(with_labels(view.here, others))

    @property
    def slices(self) -> tuple[Slices, ...]:
        """What this rank has of the tensors; members of groups that span ranks are free."""
        return self._whole

    @property
    def spans_ranks(self) -> bool:
        """Whether a group has members on several of the ranks that this one exchanges with."""
        return self._plan is not None

    def index_for(self, shards: Sequence[Tensor]) -> Index:
        """Return the index of the groups that are whole on this rank."""
        return self._compiled_for(shards)[0]

    def _compiled_for(self, shards: Sequence[Tensor]) -> tuple[Index, Exchange | None]:
        # As that of the slices in groups that span ranks: labels make no difference to it.
        layout = Layout.of(self._whole, shards)
        if layout not in self._compiled:
            plan = self._plan
            exchange = None if plan is None else Exchange(self._spanning, shards, plan, self._process_group)
            index = Views.of(self._whole, shards) or Index.compile(self._whole, shards)
            self._compiled[layout] = index, exchange
        return self._compiled[layout]

    def apply_(self, operation: Operation, tensors: Sequence[Tensor], workspace: Workspace) -> list[Any]:
        """Apply an operation to sharded tensors, and return its results for groups that are whole here, and others."""
        shards, options = [local(tensor) for tensor in tensors], operation.options
        index, exchange = self._compiled_for(shards)
        if self._across is not None and operation.needs_means:
            how = [f", {name}={value}" for name, value in options.items() if name != "means_of"]
            action = _ACTIONS[operation.function] + " after a step" * operation.stepped + "".join(how)
            agree(self._across, action, _layout_of(self._whole, shards))
        results = [operation.function(shards, index, workspace, **options)]
        if exchange is not None:
            if operation.needs_means:
                # Exchanged whatever this rank has found: the others would wait for it.
                options = {**options, "means_of": exchange.means_of(shards, workspace, operation.stepped)}
            results.append(operation.function(shards, exchange.index, workspace, **options))
        return results

    def is_tied_here(self, tensors: Sequence[Tensor], workspace: Workspace) -> bool:
        """Return whether what is pinned and groups that are whole on this rank are tied; True if that is unknown."""
        shards = [local(tensor) for tensor in tensors]
        compiled = self._compiled.get(Layout.of(self._whole, shards))
        return compiled is None or tied(shards, compiled[0], workspace)

    def answers(self, question: Operation, tensors: Sequence[Tensor], workspace: Workspace) -> list[float]:
        """Return the answers of all ranks to whether tensors are tied, or how far they have drifted."""
        answers, device = self.apply_(question, tensors, workspace), local(tensors[0]).device
        if self._mesh is not None:
            here = torch.tensor(answers, dtype=wide_dtype(device), device=device)
            answers = numbers_of_ranks(here, self._mesh).tolist()
        return answers if self._across is None else list(chain(*agree(self._across, "answer", payload=answers)))

    @torch.no_grad()
    def start_from_first_(self, tensors: Sequence[Tensor], order: Sequence[int]) -> None:
        """Give every group the value of its first member, of those across ranks that of the lowest rank.

        Args:
            tensors: as for :meth:`apply_`.
            order: as for :func:`~tieopt.numbers.start.start_from_first_`.
        """
        shards, workspace = [local(tensor) for tensor in tensors], Workspace()
        if self._across is not None:
            agree(self._across, "start from the first member", _layout_of(self._whole, shards))
        for slices in (self._whole, self._spanning):
            start_from_first_(shards, Index.compile(slices, shards), workspace, order)
        if self._plan is not None:
            exchange = Exchange(self._spanning, shards, self._plan, self._process_group)
            means_of = exchange.means_of(shards, workspace, stepped=False, of_first=True)
            project_(shards, exchange.index, workspace, means_of=means_of)


# As what users know them.
_ACTIONS: dict[Any, str] = {
    project_: "tie members",
    relax_: "pull members together",
    tied: "compare members",
    drift: "tie_drift()",
}


class _View(NamedTuple):
    """What a rank knows of a tie.

    Attributes:
        slices: of whole tensors.
        here: of what this rank has of them.
        members: the labels of the members of each rank that it exchanges with, from 0 on.
        rank: which of these ranks this one is.
        process_group: of these ranks; None if this one is alone.
        peers: those of these ranks that have the other slices, if labels are sharded.
    """

    slices: Sequence[Slices]
    here: Sequence[Slices]
    members: list[Tensor]
    rank: int
    process_group: ProcessGroup | None
    peers: Peers | None = None


def _view_on_mesh(mesh: DeviceMesh, tie: Partition, slices: Sequence[Slices], tensors: Sequence[DTensor]) -> _View:
    # Sharded tensors may have taken the places of whole ones since they were tied.
    for tensor, name in zip(tensors, tie.names, strict=True):
        check_sharding(tensor, name)
    _check_same(tie, tensors)
    slices, dims = cut_apart(tie.names, slices, tensors)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        # A rank outside the mesh has no entries, and torch gives it tensors of one dimension.
        nothing = [Slices(torch.empty(0, dtype=torch.int64, device="cpu")) for _ in tensors]
        peers = Peers.alone() if tie.labels_are_sharded else None
        return _View(nothing, nothing, [nothing[0].labels], 0, None, peers)
    here = list(coordinate)
    _check_chunks(tie, tensors, here)
    process_group, coordinates = _ranks_along(mesh, dims, here)
    # Ranks that differ in other dimensions have the same groups, and exchange them among themselves.
    peers_at = [all(dim in dims or at[dim] == here[dim] for dim in range(len(here))) for at in coordinates]
    rank = coordinates.index(here)
    if tie.labels_are_sharded:
        slices = [part._replace(sharding=None) for part in slices]
        ranks = torch.tensor(peers_at, device="cpu").nonzero().squeeze(1)
        peers = Peers(process_group, ranks, rank, len(coordinates), local(tensors[0]).device)
        return _View(slices, slices, [], rank, process_group, peers)

    def shard_at(coordinate: list[int]) -> list[Slices]:
        return [slices_of_shard(*cut, coordinate) for cut in zip(slices, tensors, strict=True)]

    cuts = zip(coordinates, peers_at, strict=True)
    members = [_labels_of_members(shard_at(at) if takes_part else ()) for at, takes_part in cuts]
    shard = shard_at(here)
    if not tie.is_linear:
        parts = zip(shard, slices, tensors, strict=True)
        shard = [part._replace(offset=_offset_of_shard(whole, tensor, here)) for part, whole, tensor in parts]
    return _View(slices, shard, members, rank, process_group)


def _labelled_alike(
    across: Across, slices: Sequence[Slices], tensors: Sequence[Any]
) -> tuple[Sequence[Slices], tuple[Tensor, Tensor]]:
    """Give slices the labels that all ranks give to their groups.

    Returns:
        The slices; and for each group of this rank whether a lower rank has members of it, and how many members it has
        on all ranks.

    Raises:
        RuntimeError: the ranks have different tensors.
    """
    sizes = torch.bincount(_labels_of_members(slices), minlength=len(across.labels))
    settings = _layout_of(slices, [local(tensor) for tensor in tensors])
    told = agree(across, "bind", settings, (across.labels, sizes))
    # Labels may be any numbers.
    known, numbers = torch.unique(torch.cat([labels for labels, _ in told]), return_inverse=True)
    by_rank = numbers.split([len(labels) for labels, _ in told])
    counts = torch.zeros(len(known), dtype=torch.int64, device="cpu")
    counts.index_add_(0, numbers, torch.cat([sizes for _, sizes in told]))
    rank = dist.get_rank(across.process_group)
    here, lower = by_rank[rank], torch.cat([numbers[:0], *by_rank[:rank]])
    labels = [part.labels.clone() for part in slices]
    for of_part in labels:
        members = of_part != FREE
        of_part[members] = here[of_part[members]]
    return with_labels(slices, labels), (torch.isin(here, lower), counts[here])


def _view_across(across: Across, tie: Partition, tensors: Sequence[Any], view: _View) -> _View:
    """Return what is known once all ranks have told which groups they have members of.

    Raises:
        ValueError: members of a group are on different ranks of the meshes.
    """
    spans_mesh = len(plan_exchange(view.members, view.rank)[1]) > 0
    told = agree(across, "plan", payload=(_labels_of_members(view.here), _labels_of_members(view.slices), spans_mesh))
    known = torch.unique(torch.cat([whole for _, whole, _ in told]))
    there = torch.stack([torch.isin(known, here) for here, *_ in told])
    missing = torch.stack([torch.isin(known, whole) for _, whole, _ in told]) & ~there
    is_apart = bool((there.any(0) & missing.any(0)).any()) or any(spans_mesh for *_, spans_mesh in told)
    # Whatever a rank refuses, all have to: one that goes on would wait for the others.
    if on_any_rank(is_apart, tensors[0]):
        what = "A group across ranks has members on different ranks of a mesh."
        expected = "parameters that are sharded alike, so that the members of a group have one place in the mesh"
        raise refusal(ValueError, what, parameters=", ".join(tie.names), expected=expected, got=described(tie.slices))
    rank = dist.get_rank(across.process_group)
    return _View(view.slices, view.here, [here for here, *_ in told], rank, across.process_group)


def _layout_of(slices: Sequence[Slices], shards: Sequence[Tensor]) -> dict[str, object]:
    return {"shape of slices": tuple(slices[0].slice_shape(shards[0].shape)), "dtype": shards[0].dtype}


def _labels_of_members(slices: Sequence[Slices]) -> Tensor:
    nothing = torch.empty(0, dtype=torch.int64, device="cpu")
    return torch.cat([nothing, *(part.labels[_is_member(part)] for part in slices)])


def _is_member(slices: Slices) -> Tensor:
    """Return which slices are in groups; those that are pinned are in none."""
    return (slices.labels != FREE) & (slices.scales != 0)


def rows_sent(slices: Slices, plan: Plan) -> Tensor:
    """Return for each slice the row that is sent for its group; -1 if the group is whole here, or pinned."""
    if not len(plan.groups):
        return torch.full_like(slices.labels, FREE)
    ascending, order = plan.groups.sort()
    at = torch.searchsorted(ascending, slices.labels.contiguous()).clamp_(max=len(ascending) - 1)
    return torch.where((ascending[at] == slices.labels) & _is_member(slices), order[at], FREE)


# --- how tensors are cut ---


def _common_mesh(tie: Partition, tensors: Sequence[DTensor]) -> DeviceMesh:
    meshes = [getattr(tensor, "device_mesh", None) for tensor in tensors]
    for mesh, name in zip(meshes, tie.names, strict=True):
        if mesh != meshes[0]:
            expected, got = f"{meshes[0] or 'no mesh'}, as {tie.names[0]} has", f"{mesh or 'no mesh'} of {name}"
            raise refusal(ValueError, "Joined parameters are not sharded over one mesh.", expected=expected, got=got)
    return tensors[0].device_mesh


def cut_apart(
    names: Sequence[str], slices: Sequence[Slices], tensors: Sequence[DTensor]
) -> tuple[Sequence[Slices], list[int]]:
    """Find the dimensions of the mesh along which members of a group may be on several ranks.

    Returns:
        The slices, written out entry by entry if they are sharded in different ways, and the dimensions.
    """
    cuts = [
        {cut_by(part, tensor.placements[dim]) for part, tensor in zip(slices, tensors, strict=True)}
        for dim in range(tensors[0].device_mesh.ndim)
    ]
    for dim, ways in enumerate(cuts):
        if None in ways and len(ways) > 1:
            what = "Joined parameters are not sharded over the same dimensions of the mesh."
            got = f"{', '.join(str(tensor.placements[dim]) for tensor in tensors)} in dimension {dim}"
            expected = "all of them sharded over a dimension, or none"
            raise refusal(ValueError, what, parameters=", ".join(names), expected=expected, got=got)
    if all(len(ways) == 1 for ways in cuts):
        return slices, [dim for dim, ways in enumerate(cuts) if ways == {0}]
    by_entry = [part.by_entry(tensor.shape) for part, tensor in zip(slices, tensors, strict=True)]
    return by_entry, [dim for dim, ways in enumerate(cuts) if ways != {None}]


def cut_by(slices: Slices, placement: Any) -> int | None:
    """Return what a placement cuts: 0 for slices from each other, from 1 on a dimension of them, None for nothing."""
    if not placement.is_shard():
        return None
    # Slices are labelled along the first dimensions, once their own is the first of all.
    dim = 0 if placement.dim == slices.dim else placement.dim + (placement.dim < slices.dim)
    return max(dim - slices.labels.dim() + 1, 0)


def slices_of_shard(slices: Slices, tensor: DTensor, coordinate: Sequence[int]) -> Slices:
    """Return the labels and scales of the slices in the shard at a coordinate of the mesh."""
    part = bounds_in_front(slices, tensor, coordinate)[: slices.labels.dim()]
    # Views would keep the labels of all shards.
    scale = None if slices.scale is None else slices.scale[part].clone()
    return Slices(slices.labels[part].clone(), scale, slices.dim)


def _offset_of_shard(slices: Slices, tensor: DTensor, coordinate: Sequence[int]) -> Offset | None:
    bounds, depth = bounds_in_front(slices, tensor, coordinate), slices.labels.dim()
    return slices.offset and slices.offset.cut(bounds[:depth], bounds[depth:])


def bounds_in_front(slices: Slices, tensor: DTensor, coordinate: Sequence[int]) -> tuple[slice, ...]:
    """Return which part of a tensor is in a shard, the dimension of the slices in front."""
    bounds = list(bounds_of(tensor, coordinate)) or [slice(1)]
    bounds.insert(0, bounds.pop(slices.dim))
    return tuple(bounds)


# --- what cannot be tied ---


def _check_still_sharded(tie: Partition, tensors: Sequence[Any]) -> None:
    """Refuse tensors that are not sharded as the labels of their slices are."""
    for part, tensor, name in zip(tie.slices, tensors, tie.names, strict=True):
        got = sharding_of_slices(tensor, part.dim)
        if part.sharding is not None and part.sharding != got:
            what = "A parameter is not sharded as its labels any more."
            expected = f"slices with placements {part.sharding[1]} on {part.sharding[0]}"
            raise refusal(ValueError, what, parameter=name, expected=expected, got=f"{got[1]} on {got[0]}")


def _check_same(tie: Partition, tensors: Sequence[DTensor]) -> None:
    """Refuse ties that differ between ranks: each would take what the others send for that of other groups."""
    # Of sharded labels each rank has its own.
    compared = [part if part.sharding is None else part._replace(labels=part.labels[:0]) for part in tie.slices]
    known = [
        (slices.dim, tuple(slices.labels.shape), slices.scale is None, slices.offset is None) for slices in compared
    ]
    digest = hashlib.sha256(repr(known).encode())
    for slices in compared:
        offset = slices.offset and slices.offset[:2]
        for column in (slices.labels, slices.scale, *(offset or ())):
            if column is not None:
                digest.update(raw_bytes(column.contiguous()))
    number = torch.tensor([int.from_bytes(digest.digest()[:7])], device=local(tensors[0]).device)
    if bool((numbers_of_ranks(number, tensors[0].device_mesh) != number).any()):
        what = "This rank has other ties than some other rank."
        expected = "the same labels, scales and offsets on every rank"
        got = f"{described(tie.slices)} here"
        raise refusal(ValueError, what, parameters=", ".join(tie.names), expected=expected, got=got)


def _check_chunks(tie: Partition, tensors: Sequence[DTensor], here: Sequence[int]) -> None:
    for tensor, name in zip(tensors, tie.names, strict=True):
        shape, expected = local(tensor).shape, tuple(part.stop - part.start for part in bounds_of(tensor, here))
        # All ranks have to agree: one that goes on alone would wait for the others.
        if on_any_rank(shape != expected, tensor):
            what = f"{name} of shape {tuple(tensor.shape)} is not cut as torch.chunk cuts."
            wanted = f"a shard of shape {expected} at {tuple(here)} in {tensor.device_mesh}"
            got = f"{tuple(shape)}{', and another on some rank' * (shape == expected)}"
            raise refusal(ValueError, what, expected=wanted, got=got)
    for part, tensor, name in zip(tie.slices, tensors, tie.names, strict=True):
        if part.sharding is None:
            continue
        rows = bounds_in_front(part, tensor, here)[0]
        count, wanted = len(part.labels), rows.stop - rows.start
        if on_any_rank(count != wanted, tensor):
            what = f"Sharded labels for {name} of shape {tuple(tensor.shape)} are not cut as the parameter is."
            got = f"{count}{', and others on some rank' * (count == wanted)}"
            raise refusal(ValueError, what, expected=f"{wanted} labels at {tuple(here)}", got=got)


def _check_replicas(tie: Partition, tensor: DTensor, totals: Totals) -> None:
    """Refuse sharded labels that differ between ranks that have the same slices."""
    here = torch.tensor([totals], device=local(tensor).device)
    if bool((numbers_of_ranks(here, tensor.device_mesh) != here).any()):
        what = "Ranks that have the same slices have other labels for them."
        expected = "the same labels on all ranks along the dimensions of the mesh where the labels are replicated"
        raise refusal(ValueError, what, parameter=tie.names[0], expected=expected, got=f"{tie.slices[0]}")


def _check_scales(slices: Sequence[Slices], spanning: Tensor, names: Sequence[str]) -> None:
    for part, name in zip(slices, names, strict=True):
        rounding = (part.scales.abs() != 1) & (part.scales != 0)
        spans = torch.isin(part.labels[rounding], spanning)
        if bool(spans.any()):
            what = "A group whose members are on several ranks has multiples that are rounded."
            expected = "scales of -1, 0 and 1, or groups that are whole on one rank"
            got = f"a scale of {float(part.scales[rounding][spans][0])}"
            raise refusal(ValueError, what, parameter=name, expected=expected, got=got)


def _check_offsets(slices: Sequence[Slices], spanning: Tensor, names: Sequence[str]) -> None:
    """Refuse groups with an offset whose members are on several ranks, each of which rounds by a lead of its own."""
    for part, name in zip(slices, names, strict=True):
        if part.offset is None:
            continue
        spans = torch.isin(part.labels, spanning) & (part.scales != 0)
        offsets = part.offset.at(part.offset.rows[spans])
        if bool(offsets.any()):
            what = "A group whose members are on several ranks has an offset."
            expected = "offsets of pinned slices, or groups that are whole on one rank"
            got = f"an offset of {offsets[offsets != 0][0].item()}"
            raise refusal(ValueError, what, parameter=name, expected=expected, got=got)


# --- what the modes ask ---


def spans_ranks(tensors: Sequence[Any], tie: Partition | None = None) -> bool:
    """Return whether what is done to tensors, or to a tie of them, may take other ranks."""
    return any(map(is_sharded, tensors)) or (tie is not None and (tie.across is not None or tie.labels_are_sharded))


def on_any_rank(condition: bool, tensor: Any) -> bool:
    """Return whether something holds on a rank that has a shard of a tensor; on this one, if the tensor is whole."""
    if not is_sharded(tensor):
        return condition
    here = torch.tensor([condition], dtype=torch.uint8, device=local(tensor).device)
    return bool(numbers_of_ranks(here, tensor.device_mesh).max())


def placed_as(grad: Any, param: Any) -> Tensor:
    """Return the gradient of a sharded parameter where its parameter is.

    Raises:
        RuntimeError: it is sparse, has a graph, or is not sharded over the mesh of the parameter.
    """
    mesh = grad.device_mesh if is_sharded(grad) else "no mesh"
    if grad.requires_grad or grad.layout != torch.strided or mesh != param.device_mesh:
        what = "The gradient of a sharded parameter cannot be tied."
        expected = f"a dense one, without a graph, over {param.device_mesh}"
        got = f"{grad.layout}, requires_grad={grad.requires_grad}, over {mesh}"
        raise refusal(RuntimeError, what, expected=expected, got=got)
    # Parts of a sum are added up, as the inner optimizer would have to.
    placed: Tensor = grad if grad.placements == param.placements else grad.redistribute(placements=param.placements)
    return placed


# --- what ranks say to each other ---


def numbers_of_ranks(values: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the numbers that all ranks of a mesh have; on a rank outside it, those that it has."""
    if mesh.get_coordinate() is None:
        return values
    for dim in range(mesh.ndim):
        parts = [torch.empty_like(values) for _ in range(mesh.size(dim))]
        dist.all_gather(parts, values, group=mesh.get_group(dim))
        values = torch.cat(parts)
    return values


_process_groups: WeakKeyDictionary[DeviceMesh, ProcessGroup] = WeakKeyDictionary()


def _ranks_along(mesh: DeviceMesh, dims: list[int], here: list[int]) -> tuple[ProcessGroup | None, list[list[int]]]:
    """Find the ranks whose coordinates differ from this one's in some dimensions of a mesh.

    Returns:
        A process group that they are in, None if there are no such dimensions, and the coordinates of all its ranks.
    """
    if not dims:
        return None, [here]
    group: ProcessGroup | None
    if len(dims) == 1:
        group = mesh.get_group(dims[0])
    elif mesh.size() == dist.get_world_size():
        group = dist.group.WORLD
    else:
        # The mesh has groups along one dimension; one of all its ranks is made once.
        group = _process_groups.get(mesh) or _process_groups.setdefault(mesh, _process_group_of(mesh))
    return group, [(mesh.mesh == rank).nonzero()[0].tolist() for rank in dist.get_process_group_ranks(group)]


def _process_group_of(mesh: DeviceMesh) -> Any:
    """Make a process group of the ranks of a mesh, while others are not there to take part.

    Its members find each other by its name, which torch makes from a number that may differ between them: how many
    groups a rank is in, and since torch 2.14 how many it has made. Groups of one make the former equal. The latter is
    set, and set back after, because the ranks of the world find each other by it when they next make a group together.
    """
    world = dist.distributed_c10d._world
    count, made = len(world.pg_names), world.group_count
    most = int(numbers_of_ranks(torch.tensor([count], device=mesh.device_type), mesh).max())
    try:
        for number in range(count, most + 1):
            # Below zero, so that the name is none that torch has given or will give.
            world.group_count = -number
            ranks = sorted(mesh.mesh.flatten().tolist()) if number == most else [dist.get_rank()]
            group = dist.new_group(ranks, use_local_synchronization=True)
    finally:
        world.group_count = made
    return group


# --- for tensors of any kind ---


def is_dense(value: Any, shape: torch.Size, sharding: tuple[Any, Any] = (None, None)) -> bool:
    """Return whether a value is a dense tensor of numbers of a shape that is sharded in some way, or not at all."""
    if not is_sharded(value):
        return sharding == (None, None) and has_shape(value, shape)
    shard = local(value)
    return sharding_of(value) == sharding and value.shape == shape and has_shape(shard, shard.shape)


def fits(value: Any, param: Tensor) -> bool:
    """Return whether a value is a dense tensor of numbers that has the shape of a parameter, and lies where it does."""
    return is_dense(value, param.shape, sharding_of(param)) and value.device == param.device


def any_negative(tensors: Iterable[Tensor]) -> bool:
    """Return whether an entry of a tensor is negative, on any rank."""
    return any(
        on_any_rank(bool((calculable(real(local(tensor).resolve_conj())) < 0).any()), tensor) for tensor in tensors
    )


@torch.no_grad()
def fill_where_(tensor: Any, mask: Tensor, number: complex) -> None:
    """Write a number to the entries of a tensor that a mask marks, of which every rank has the whole."""
    if is_sharded(tensor):
        if tensor.device_mesh.get_coordinate() is None:
            return
        mask = shard_of(mask, tensor)
    local(tensor).masked_fill_(mask.to(tensor.device), number)
