"""Ties of sharded parameters: the same reduction over the shards that several ranks have.

Slices of a :class:`~torch.distributed.tensor.DTensor` are where its placements put them. Groups that are whole on one
rank are tied there, as if its shard were all there is; the members of the others are first added up on each rank, and
their means are exchanged, see :mod:`~tieopt.engine.exchange`. Ties of rows whose entries are sharded, and not the rows,
exchange nothing.

All ranks of the mesh have to take part in whatever ties, in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from tieopt.engine.exchange import Holdings, Plan
from tieopt.errors import refusal
from tieopt.numbers.index import Index, Layout, Run, order_within
from tieopt.numbers.reduction import (
    Operation,
    ValuesOf,
    Workspace,
    group_means,
    is_narrow,
    means_after_step,
    rounded,
    scatter_add_,
    tied,
    towards_leads_,
)
from tieopt.tensors import (
    Bounds,
    bits,
    bounds_of,
    check_sharding,
    column,
    in_memory,
    is_sharded,
    local,
    octets,
    wide_dtype,
)
from tieopt.ties.slices import FREE, Partition, Slices, described, numbered


def slices_of_shard(slices: Slices, bounds: Bounds) -> Slices:
    """The labels and scales of the slices in a shard."""
    labels, scale = slices.labels, slices.scale
    for axis, dim in enumerate(_order(slices, len(bounds))[: labels.dim()]):
        labels = labels.narrow(axis, *bounds[dim])
        scale = None if scale is None else scale.narrow(axis, *bounds[dim])
    # Views would keep the labels of all shards.
    return Slices(labels.clone(), None if scale is None else scale.clone(), slices.dim)


def _order(slices: Slices, dims: int) -> list[int]:
    """The dimensions of a tensor, that along which the slices lie first."""
    return [slices.dim, *(dim for dim in range(dims) if dim != slices.dim)]


class _Site(NamedTuple):
    """Where the members of spanning groups are in shards of one layout.

    Attributes:
        members: their index.
        rows: for each run, by its identity, which of the rows that are sent its groups are.
        signs: for each run what its leads are of the shared values, 1 or -1; None if all are 1.
        plan: with its tensors on the device.
    """

    members: Index
    rows: dict[int, Tensor]
    signs: dict[int, Tensor | None]
    plan: Plan


class Shards:
    """A tie of sharded tensors, as this rank sees it.

    Args:
        tie: of the tensors.
        tensors: those, which say how they are sharded.

    Attributes:
        plan: what this rank exchanges in a projection; None if no group spans ranks.

    Raises:
        ValueError: they are not sharded alike, ranks have different ties, or a group that spans ranks has scales that
            round.
    """

    def __init__(self, tie: Partition, tensors: Sequence[Any]) -> None:
        slices: Sequence[Slices] = tie.slices
        names = tie.names
        self._mesh = _common_mesh(tensors, names)
        # Sharded tensors may have taken the places of whole ones since they were tied.
        for tensor, name in zip(tensors, names, strict=True):
            check_sharding(tensor, name)
        _check_same(slices, tensors, names)
        slices, dims = _exchanged(slices, tensors, names)
        self._sites: dict[Layout, _Site] = {}
        self._indices: dict[Layout, Index] = {}
        self.plan: Plan | None = None
        coordinate = self._mesh.get_coordinate()
        if coordinate is None:
            # A rank outside the mesh has no entries, and torch gives it tensors of one dimension.
            self._whole = tuple(Slices(torch.empty(0, dtype=torch.int64, device="cpu")) for _ in tensors)
            return
        here = list(coordinate)
        self._group, places = _group_along(self._mesh, dims, here)
        shards = [
            [
                slices_of_shard(each, bounds_of(tensor.shape, self._mesh.shape, tensor.placements, place))
                for each, tensor in zip(slices, tensors, strict=True)
            ]
            for place in places
        ]
        self._rank = rank = places.index(here)
        _check_cut(tensors, names, here)
        holdings = Holdings.of([torch.cat([each.labels[_is_member(each)] for each in own]) for own in shards])
        for own in shards:
            _check_scales(own, holdings.groups, names)
        plan = Plan.of(holdings, rank, len(places))
        self.plan = plan if len(holdings.groups) else None
        rows = [rows_sent(each, plan) for each in shards[rank]]
        whole = [
            each._replace(labels=torch.where(sent == FREE, each.labels, FREE))
            for each, sent in zip(shards[rank], rows, strict=True)
        ]
        self._whole = numbered(whole)
        self._spanning = [each._replace(labels=sent) for each, sent in zip(shards[rank], rows, strict=True)]

    def apply_(self, operation: Operation, tensors: Sequence[Any], workspace: Workspace) -> list[Any]:
        """Apply an operation to sharded tensors, and return its results for groups that are whole here, and others."""
        shards = [local(tensor) for tensor in tensors]
        options = operation.options
        results = [operation.function(shards, self._index_for(shards), workspace, **options)]
        if self.plan is not None:
            site = self._site(shards)
            if operation.needs_means:
                # Exchanged whatever this rank has found: the others would wait for it.
                options = {**options, "means_of": self._exchange(shards, site, workspace, operation.stepped)}
            results.append(operation.function(shards, site.members, workspace, **options))
        return results

    def answer(self, question: Operation, tensors: Sequence[Any], workspace: Workspace) -> Any:
        """Return whether tensors are tied on all ranks, or the largest drift on any rank."""
        answers = self.apply_(question, tensors, workspace)
        if question.function is tied:
            return not on_any_rank(not all(answers), tensors[0])
        device = local(tensors[0]).device
        # Unlike Python's, this maximum is NaN if a drift is.
        return float(_gathered(torch.tensor(answers, dtype=wide_dtype(device), device=device).max(), self._mesh).max())

    def _index_for(self, shards: list[Tensor]) -> Index:
        layout = Layout.of(self._whole, shards)
        if layout not in self._indices:
            self._indices[layout] = Index.compile(self._whole, shards)
        return self._indices[layout]

    def _site(self, shards: list[Tensor]) -> _Site:
        layout = Layout.of(self._spanning, shards)
        if layout not in self._sites:
            self._sites[layout] = self._compiled(shards, layout)
        return self._sites[layout]

    @torch.inference_mode(False)
    def _compiled(self, shards: list[Tensor], layout: Layout) -> _Site:
        plan = cast(Plan, self.plan)
        index = Index.compile(self._spanning, shards, singles=True)
        sent = [_by_position(each.labels, each, own) for each, own in zip(self._spanning, layout.steps, strict=True)]
        scales = [_by_position(each.scales, each, own) for each, own in zip(self._spanning, layout.steps, strict=True)]
        scaled = any(each.scale is not None for each in self._spanning)
        runs, rows, signs = [], {}, {}
        for run in index.runs:
            row, sign = (
                torch.empty(len(run.norms), dtype=dtype, device="cpu") for dtype in (torch.int64, torch.float64)
            )
            for part, positions, slots in run.leads:
                row[slots.cpu()], sign[slots.cpu()] = sent[part][positions.cpu()], scales[part][positions.cpu()]
            # The sum is that over the members on all ranks.
            runs.append(run._replace(counts=plan.sizes[row].to(run.counts)))
            rows[id(runs[-1])] = row.to(layout.device)
            signs[id(runs[-1])] = sign.to(run.counts) if scaled else None
        index = replace(index, runs=tuple(runs))
        return _Site(index, rows, signs, plan.to(layout.device))

    @torch.no_grad()
    def _exchange(self, shards: list[Tensor], site: _Site, workspace: Workspace, stepped: bool = False) -> ValuesOf:
        """Exchanges the means of spanning groups; ``stepped`` as for :meth:`~tieopt.engine.engine.Batches.project_`.

        Returns:
            What gives the means of all members of the groups of each run.
        """
        rows, plan = site.members.rows(shards), site.plan
        stored, device = rows[0].dtype, rows[0].device
        order = _common_order(self._spanning[0].rows(in_memory(shards[0])), rows[0])
        back = [order.index(dim) for dim in range(len(order))]
        shape = [rows[0].shape[dim] for dim in order[1:]]
        # A mean of a few members in half precision has digits that the mean of all needs.
        wire = stored if stored.itemsize >= 4 else torch.float32

        def to_be_sent(values_of: ValuesOf, name: str) -> Tensor:
            sent = workspace.take(name, (len(plan.groups), *shape), wire, device)
            for run in site.members.runs:
                values = values_of(rows, run, workspace).permute(order)
                sent.index_copy_(0, site.rows[id(run)], _signed(values, site.signs[id(run)]).to(wire))
            return sent

        means = to_be_sent(group_means, "sent")
        received = workspace.take("received", (len(plan.slots), *shape), wire, device)
        self._send(received, means, plan.received, plan.sent)

        own = _weighted_means(received, plan)
        if stepped and is_narrow(stored):
            # An owner has members of its groups: what these make of their own mean stands for the lead, on every rank.
            first = sum(plan.sent[: self._rank])
            leads = to_be_sent(means_after_step, "settled")[first : first + len(own)].to(stored)
            towards_leads_(own, leads.to(own.dtype), stored, workspace)
        own = rounded(own, stored)
        replies = workspace.take("replies", received.shape, stored, device)
        torch.index_select(bits(own), 0, plan.slots, out=bits(replies))
        shared = workspace.take("shared", means.shape, stored, device)
        self._send(bits(shared), bits(replies), plan.sent, plan.received)

        def values_of(rows: list[Tensor], run: Run, workspace: Workspace) -> Tensor:
            values = bits(shared).index_select(0, site.rows[id(run)]).view(stored)
            return _signed(values.to(wide_dtype(device)), site.signs[id(run)]).permute(back)

        return values_of

    def _send(self, output: Tensor, tensor: Tensor, received: Sequence[int], sent: Sequence[int]) -> None:
        dist.all_to_all_single(output, tensor, list(received), list(sent), group=self._group)


def _weighted_means(values: Tensor, plan: Plan) -> Tensor:
    """The mean of each group of rows, each counted by its weight; of equal rows the row itself, bit for bit."""
    wide = values.to(wide_dtype(values.device))
    weights = column(plan.weights.to(wide.dtype), wide)
    means = wide.index_select(0, plan.firsts)
    # As in tieopt.reduction: the differences from an estimate, of which an estimate that is far off costs digits.
    for _ in range(2):
        pivots = torch.nan_to_num(means, nan=0.0, posinf=0.0, neginf=0.0)
        # In halves, because the distance of two large numbers may overflow.
        differences = wide.mul(0.5).sub_(pivots.index_select(0, plan.slots), alpha=0.5).mul_(weights)
        halves = torch.zeros_like(means)
        scatter_add_(halves, plan.slots, differences)
        corrected = halves.add(pivots, alpha=0.5).mul_(2)
        largest = torch.finfo(means.dtype).max
        corrected = torch.where(halves.isfinite(), corrected.clamp(-largest, largest), corrected)
        means = torch.where(halves == 0, means, corrected)
    return means


def _signed(values: Tensor, signs: Tensor | None) -> Tensor:
    return values if signs is None else values * column(signs.to(values.dtype), values)


def _common_order(raw: Tensor, rows: Tensor) -> list[int]:
    """The dimensions of rows as an index has them, in an order that does not depend on a rank's memory."""
    inner = order_within(raw)
    order = [0, *(1 + inner.index(dim) for dim in range(1, raw.dim()))] if raw.dim() > 2 else list(range(raw.dim()))
    return [*order, *range(raw.dim(), rows.dim())]


def _is_member(slices: Slices) -> Tensor:
    """Which slices are in groups; those that are pinned are in none."""
    return (slices.labels != FREE) & (slices.scales != 0)


def rows_sent(slices: Slices, plan: Plan) -> Tensor:
    """For each slice the row that is sent for its group; -1 if the group is whole here, or pinned."""
    if not len(plan.groups):
        return torch.full_like(slices.labels, FREE)
    ascending, order = plan.groups.sort()
    at = torch.searchsorted(ascending, slices.labels.contiguous()).clamp_(max=len(ascending) - 1)
    return torch.where((ascending[at] == slices.labels) & _is_member(slices), order[at], FREE)


def _by_position(values: Tensor, slices: Slices, steps: tuple[int, ...]) -> Tensor:
    """Values of slices by their rows, see :meth:`~tieopt.ties.slices.Slices.positions`."""
    positions = slices.positions(steps).flatten()
    table = values.new_zeros(int(positions.max()) + 1 if len(positions) else 0)
    return table.index_put_((positions,), values.flatten())


def _check_same(slices: Sequence[Slices], tensors: Sequence[Any], names: Sequence[str]) -> None:
    """Refuses ties that differ between ranks: what these exchange would be taken for that of other groups."""
    known = [(each.dim, tuple(each.labels.shape), each.scale is None) for each in slices]
    digest = hashlib.sha256(repr(known).encode())
    for numbers in (one.contiguous() for each in slices for one in (each.labels, each.scale) if one is not None):
        digest.update(octets(numbers))
    number = torch.tensor(int.from_bytes(digest.digest()[:7]), device=local(tensors[0]).device)
    if bool((_gathered(number, tensors[0].device_mesh) != number).any()):
        raise ValueError(
            "This rank has other ties than some other rank.\n"
            f"  Parameters: {', '.join(names)}\n"
            "  Expected:   the same labels and scales on every rank\n"
            f"  Got:        {described(slices)} here"
        )


def _check_cut(tensors: Sequence[Any], names: Sequence[str], here: Sequence[int]) -> None:
    for tensor, name in zip(tensors, names, strict=True):
        shard = local(tensor)
        bounds = bounds_of(tensor.shape, tensor.device_mesh.shape, tensor.placements, here)
        expected = tuple(size for _, size in bounds)
        # All ranks have to agree: one that goes on alone would wait for the others.
        if on_any_rank(shard.shape != expected, tensor):
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} is not cut as torch.chunk cuts.\n"
                f"  Expected: a shard of shape {expected} at {tuple(here)} in {tensor.device_mesh}\n"
                f"  Got:      {tuple(shard.shape)}{', and another on some rank' * (shard.shape == expected)}"
            )


def _check_scales(slices: Sequence[Slices], spanning: Tensor, names: Sequence[str]) -> None:
    for each, name in zip(slices, names, strict=True):
        rounding = _is_member(each) & (each.scales.abs() != 1)
        if each.scale is not None and bool((rounding := rounding & torch.isin(each.labels, spanning)).any()):
            raise ValueError(
                "A group whose members are on several ranks has multiples that are rounded.\n"
                f"  Parameter: {name}\n"
                "  Expected:  scales of -1, 0 and 1, or groups that are whole on one rank\n"
                f"  Got:       a scale of {float(each.scales[rounding][0])}"
            )


def _common_mesh(tensors: Sequence[Any], names: Sequence[str]) -> Any:
    meshes = [getattr(tensor, "device_mesh", None) for tensor in tensors]
    for mesh, name in zip(meshes, names, strict=True):
        if mesh != meshes[0]:
            raise ValueError(
                "Joined parameters are not sharded over one mesh.\n"
                f"  Expected: {meshes[0] or 'no mesh'}, as {names[0]} has\n"
                f"  Got:      {mesh or 'no mesh'} of {name}"
            )
    return meshes[0]


def _exchanged(
    slices: Sequence[Slices], tensors: Sequence[Any], names: Sequence[str]
) -> tuple[Sequence[Slices], list[int]]:
    """The dimensions of the mesh along which members of a group may be on several ranks.

    Returns:
        The slices, written out entry by entry if they are sharded in different ways, and the dimensions.
    """
    mesh_dims = range(tensors[0].device_mesh.ndim)
    cuts = [
        [_cut(each, tensor, tensor.placements[dim]) for each, tensor in zip(slices, tensors, strict=True)]
        for dim in mesh_dims
    ]
    for dim, own in zip(mesh_dims, cuts, strict=True):
        if None in own and len(set(own)) > 1:
            raise ValueError(
                "Joined parameters are not sharded over the same dimensions of the mesh.\n"
                f"  Parameters: {', '.join(names)}\n"
                "  Expected:   all of them sharded over a dimension, or none\n"
                f"  Got:        {', '.join(str(tensor.placements[dim]) for tensor in tensors)} in dimension {dim}"
            )
    if any(len(set(own)) > 1 for own in cuts):
        return [_by_entry(each, tensor) for each, tensor in zip(slices, tensors, strict=True)], [
            dim for dim, own in zip(mesh_dims, cuts, strict=True) if own[0] is not None
        ]
    return slices, [dim for dim, own in zip(mesh_dims, cuts, strict=True) if own[0] == 0]


def _cut(slices: Slices, tensor: Any, placement: Any) -> int | None:
    """What a placement cuts: 0 for the slices from each other, from 1 on a dimension of them, None for nothing."""
    if not placement.is_shard():
        return None
    return max(_order(slices, tensor.dim()).index(placement.dim) - slices.labels.dim() + 1, 0)


def _by_entry(slices: Slices, tensor: Any) -> Slices:
    labels, scale = slices.entries(torch.empty(tensor.shape, device="meta"))
    return Slices(labels, None if slices.scale is None else scale)


def on_any_rank(condition: bool, tensor: Any) -> bool:
    """Whether something holds on a rank that has a shard of a tensor."""
    here = torch.tensor(condition, dtype=torch.uint8, device=local(tensor).device)
    return bool(_gathered(here, tensor.device_mesh).max())


_groups: WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = WeakKeyDictionary()


def _group_along(mesh: Any, dims: Sequence[int], here: list[int]) -> tuple[Any, list[list[int]]]:
    """The process group of the ranks that differ from this one in some dimensions of a mesh alone.

    Returns:
        The group, and the coordinates of its ranks.
    """
    if not dims:
        return None, [here]
    chosen = tuple(slice(None) if dim in dims else at for dim, at in enumerate(here))
    ranks = sorted(mesh.mesh[chosen].flatten().tolist())
    if len(dims) == 1:
        group = mesh.get_group(dims[0])
    elif len(ranks) == dist.get_world_size():
        group = dist.group.WORLD
    else:
        # The mesh has groups along one dimension; one along several is made once.
        made = _groups.setdefault(mesh, {})
        if tuple(dims) not in made:
            made[tuple(dims)] = _new_group(mesh, dims, ranks)
        group = made[tuple(dims)]
    return group, [(mesh.mesh == rank).nonzero()[0].tolist() for rank in dist.get_process_group_ranks(group)]


def _new_group(mesh: Any, dims: Sequence[int], ranks: list[int]) -> Any:
    """A process group of some ranks, made while others make those of theirs."""
    if mesh.size() < dist.get_world_size():
        # Those outside the mesh are not there to take part. Made by its members alone, a group is named by how many
        # groups a member is in, and found by those alone that call it so: groups of one make up for what is missing.
        count = len(dist.distributed_c10d._world.pg_names)
        most = _gathered(torch.tensor(count, device=mesh.device_type), mesh).max()
        for _ in range(count, int(most)):
            dist.new_group([dist.get_rank()], use_local_synchronization=True)
        return dist.new_group(ranks, use_local_synchronization=True)
    others = [dim for dim in range(mesh.ndim) if dim not in dims]
    parts = mesh.mesh.permute(*others, *dims).reshape(-1, len(ranks)).tolist()
    group, _ = dist.new_subgroups_by_enumeration([sorted(part) for part in parts])  # type: ignore[no-untyped-call]
    return group


def _gathered(value: Tensor, mesh: Any) -> Tensor:
    """The values of a number on all ranks of a mesh; on a rank outside it, its own."""
    values = value.reshape(1)
    if mesh.get_coordinate() is None:
        return values
    for dim in range(mesh.ndim):
        parts = [torch.empty_like(values) for _ in range(mesh.size(dim))]
        dist.all_gather(parts, values, group=mesh.get_group(dim))
        values = torch.cat(parts)
    return values


def spans_ranks(tensors: Sequence[Any]) -> bool:
    """Return whether what is done to tensors may take other ranks."""
    return any(map(is_sharded, tensors))


def placed_as(grad: Any, param: Any) -> Tensor:
    """Return the gradient of a sharded parameter where its parameter is.

    Raises:
        RuntimeError: it is sparse, has a graph, or is not sharded over the mesh of the parameter.
    """
    mesh = grad.device_mesh if is_sharded(grad) else "no mesh"
    if grad.requires_grad or grad.layout != torch.strided or mesh != param.device_mesh:
        raise refusal(
            RuntimeError,
            "The gradient of a sharded parameter cannot be tied.",
            expected=f"a dense one, without a graph, over {param.device_mesh}",
            got=f"{grad.layout}, requires_grad={grad.requires_grad}, over {mesh}",
        )
    # Parts of a sum are added up, as the inner optimizer would have to.
    placed: Tensor = grad if grad.placements == param.placements else grad.redistribute(placements=param.placements)
    return placed
