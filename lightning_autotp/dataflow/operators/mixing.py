"""Operators that mix along some dims and leave the others alone: windows, pools, transforms, linear algebra."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from lightning_autotp.dataflow.event import Event, Unknown, Wrong
from lightning_autotp.dataflow.operators.combine import check_not_mixed, check_not_partial, combine, unlike_zero
from lightning_autotp.dataflow.operators.pointwise import placed
from lightning_autotp.dataflow.operators.registry import register
from lightning_autotp.dataflow.operators.slices import taken
from lightning_autotp.dataflow.operators.views import regrouped
from lightning_autotp.dataflow.placement import Constant, Placement, Repeated

_POOLS = {
    **{f"avg_pool{n}d": n for n in (2, 3)},
    **{f"_adaptive_avg_pool{n}d": n for n in (2, 3)},
    **{f"reflection_pad{n}d": n for n in (1, 2, 3)},
    **{f"replication_pad{n}d": n for n in (1, 2, 3)},
    **{f"upsample_nearest{n}d": n for n in (1, 2, 3)},
    **{"upsample_linear1d": 1, "upsample_bilinear2d": 2, "upsample_bicubic2d": 2, "upsample_trilinear3d": 3},
}
"""Operators that are linear, with the number of last dims that they mix; each has a gradient."""

_MAXIMA = {"max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3}

_SAMPLED = tuple(name for name in _POOLS if name.startswith("upsample"))


def check_held(placement: Placement, over: Collection[int], what: str) -> None:
    """Do not follow an operator along dims that the ranks do not hold in full."""
    for at in sorted(over):
        if placement.dims[at] is not None:
            raise Unknown(f"no rule says what {what} makes along dim {at} ({placement.dims[at]}).")


def _last(ndim: int, count: int) -> range:
    return range(ndim - count, ndim)


@register(*_POOLS, *_MAXIMA)
def pool(event: Event) -> Placement:
    """Windows or samples of the last dims."""
    placement = event.tensor("self").placement
    mixed = _POOLS.get(event.name) or _MAXIMA[event.name]
    check_held(placement, _last(len(placement.dims), mixed), event.name)
    if event.name in _MAXIMA:
        check_not_partial(placement, "a maximum")
        return replace(placement, zero=False)
    return placement


@register(
    *(f"{name}_backward" for name in _POOLS if name not in _SAMPLED),
    *(f"{name}_backward" for name in _MAXIMA),
)
def pool_backward(event: Event) -> Placement:
    """Linear in the gradient."""
    grad, operand = event.tensor("grad_output"), event.tensor("self")
    name = event.name.removesuffix("_backward")
    mixed = _POOLS.get(name) or _MAXIMA[name]
    rest = len(operand.shape) - mixed
    for placement in (grad.placement, operand.placement):
        check_held(placement, _last(rest + mixed, mixed), event.name)
        if any(isinstance(dim, (Constant, Repeated)) for dim in placement.dims):
            raise Unknown(f"{event.name} of other numbers of equal entries than the full model's has no rule.")
    known = replace(operand.placement, dims=operand.placement.dims[:rest], partial=False, zero=False)
    own = replace(grad.placement, dims=grad.placement.dims[:rest])
    made = combine([(operand.shape[:rest], known), (grad.shape[:rest], own)], operand.shape[:rest], "product")
    if name in _MAXIMA and (operand.placement.partial or event.tensor("indices").placement.partial):
        raise Wrong("the gradient of a maximum of a partial sum: sum it over the ranks first.")
    return replace(made, dims=(*made.dims, *(None,) * mixed))


@register(*(f"{name}_backward" for name in _SAMPLED), sizes=True)
def upsample_backward(event: Event) -> Placement:
    """Linear in the gradient; the ranks name their own sizes of dims that are not mixed."""
    placement = event.tensor("grad_output").placement
    mixed = _POOLS[event.name.removesuffix("_backward")]
    check_held(placement, _last(len(placement.dims), mixed), event.name)
    for call in event.ranks:
        for name, full in event.arguments.items():
            own = call.arguments[name]
            if isinstance(full, (list, tuple)) and list(own)[-mixed:] != list(full)[-mixed:]:
                raise Wrong(f"ranks sample with {name} {own}, the full model with {full}.")
            if isinstance(full, (bool, float)) and own != full:
                raise Wrong(f"ranks sample with {name} {own}, the full model with {full}.")
    return placement


@register("unfold")
def unfold(event: Event) -> Placement:
    """Windows along a dim become a new last dim."""
    placement = event.tensor("self").placement
    check_held(placement, {event.dim("dimension")}, "unfold")
    return replace(placement, dims=(*placement.dims, None))


@register("unfold_backward", sizes=True)
def unfold_backward(event: Event) -> Placement:
    """The sum of all windows that an entry is in."""
    placement = event.tensor("grad_in").placement
    dim = event["dim"] % (len(placement.dims) - 1)
    check_held(placement, {dim, len(placement.dims) - 1}, "unfold_backward")
    for call in event.ranks:
        if any(call.arguments[name] != event[name] for name in ("dim", "size", "step")):
            raise Wrong("ranks take other windows than the full model.")
        if call.arguments["input_sizes"][dim] != event["input_sizes"][dim]:
            raise Wrong("ranks take windows of another length than the full model.")
    return replace(placement, dims=placement.dims[:-1])


@register("im2col", "col2im")
def patches(event: Event) -> Placement:
    """Windows of the last two dims become channels, or channels windows: of shards in whole channels."""
    operand, shape = event.tensor("self"), event.outputs[0]
    if len(operand.shape) != (4 if event.name == "im2col" else 3):
        raise Unknown(f"{event.name} without rows has no rule.")
    placement = operand.placement
    check_held(placement, range(2, len(operand.shape)), event.name)
    window, channels = event["kernel_size"][0] * event["kernel_size"][1], operand.shape[1]
    if event.name == "im2col":
        made = regrouped([placement.dims[1], None], [channels, window], [channels * window])
    else:
        made = regrouped([placement.dims[1]], [channels], [channels // window, window])
        check_held(replace(placement, dims=tuple(made)), {1}, event.name)
    return replace(placement, dims=(placement.dims[0], made[0], *(None,) * (len(shape) - 2)))


@register("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(event: Event) -> Placement:
    """Squares of the last two dims become channels, or channels squares: of shards in whole channels."""
    operand = event.tensor("self")
    placement, ndim = operand.placement, len(operand.shape)
    check_held(placement, _last(ndim, 2), event.name)
    factor, channels = event.arguments.get("upscale_factor") or event["downscale_factor"], operand.shape[-3]
    if event.name == "pixel_unshuffle":
        made = regrouped([placement.dims[-3], None], [channels, factor**2], [channels * factor**2])
    else:
        made = regrouped([placement.dims[-3]], [channels], [channels // factor**2, factor**2])
        check_held(replace(placement, dims=tuple(made)), {1}, event.name)
    return replace(placement, dims=(*placement.dims[:-3], made[0], None, None))


@register("_fft_r2c", "_fft_c2r", "_fft_c2c")
def fourier(event: Event) -> Placement:
    """Linear, and mixes along its dims."""
    placement = event.tensor("self").placement
    check_not_mixed(placement, {at % len(placement.dims) for at in event["dim"]}, "transforms")
    return placement


@register("glu")
def glu(event: Event) -> Placement:
    """The first half of a dim times the sigmoid of the second, of which the ranks must hold the same."""
    operand, dim = event.tensor("self"), event.dim()
    check_not_partial(operand.placement, "glu is no linear function")
    half, shape = operand.shape[dim] // 2, event.outputs[0]
    own = [operand.placement.local_shape(operand.shape, rank)[dim] // 2 for rank in range(len(event.ranks))]
    first = taken(operand, dim, range(half), [range(size) for size in own])
    second = taken(operand, dim, range(half, 2 * half), [range(size, 2 * size) for size in own])
    dims = operand.placement.dims
    halves = [(shape, Placement((*dims[:dim], held, *dims[dim + 1 :]))) for held in (first, second)]
    return combine(halves, shape)


@register("glu_backward")
def glu_backward(event: Event) -> Placement:
    """Linear in the gradient."""
    grad, operand = event.tensor("grad_output"), event.tensor("self")
    dim = event.dim()
    check_held(operand.placement, {dim}, "glu_backward")
    check_held(grad.placement, {dim}, "glu_backward")
    check_not_partial(operand.placement, "the gradient of glu")
    shape = tuple(1 if at == dim else size for at, size in enumerate(grad.shape))
    return replace(
        combine([(shape, unlike_zero(operand.placement)), (shape, grad.placement)], shape, "product"),
        zero=grad.placement.zero,
    )


@register("linalg_cross")
def cross(event: Event) -> Placement:
    """Linear in each operand; mixes along one dim."""
    made = combine([placed(operand) for operand in event.operands], event.outputs[0], "product")
    check_not_mixed(made, {event["dim"] % len(made.dims)}, "takes the cross product")
    return made


@register("_cdist_forward")
def distances(event: Event) -> Placement:
    """Distances of all pairs: linear in nothing, and over all features."""
    first, second = event.tensor("x1"), event.tensor("x2")
    last = len(first.shape) - 1
    for operand in (first, second):
        check_not_partial(operand.placement, "a distance is no linear function")
        check_not_mixed(operand.placement, {len(operand.shape) - 1}, "takes distances")
    shape = event.outputs[0]
    rows = (*first.shape[:-1], 1), replace(first.placement, zero=False)
    columns = (
        (*second.shape[:-2], 1, second.shape[-2]),
        replace(
            second.placement, dims=(*second.placement.dims[: last - 1], None, second.placement.dims[-2]), zero=False
        ),
    )
    return combine([rows, columns], shape)


@register(
    *("linalg_solve_triangular", "linalg_inv_ex", "linalg_cholesky_ex", "_linalg_eigh", "_linalg_svd", "_linalg_det"),
    *("linalg_qr", "_linalg_slogdet", "linalg_matrix_exp"),
)
def matrices(event: Event) -> list[Placement]:
    """Functions of whole matrices, each by itself."""
    operands = event.operands
    rows = [operand.shape[:-2] for operand in operands]
    for operand in operands:
        check_not_partial(operand.placement, f"{event.name} is no linear function")
        check_not_mixed(operand.placement, _last(len(operand.shape), 2), f"computes {event.name}")
    shape = event.outputs[0][: max(map(len, rows))]
    dims = [replace(operand.placement, dims=operand.placement.dims[:-2], zero=False) for operand in operands]
    made = combine(list(zip(rows, dims)), shape)
    return [replace(made, dims=(*made.dims, *(None,) * (len(out) - len(shape)))) for out in event.outputs]


@register("diagonal")
def diagonal(event: Event) -> Placement:
    """Two dims become one, behind all others."""
    operand = event.tensor("self")
    first, second = event.dim("dim1"), event.dim("dim2")
    check_held(operand.placement, {first, second}, "diagonal")
    rest = [held for at, held in enumerate(operand.placement.dims) if at not in (first, second)]
    return replace(operand.placement, dims=(*rest, None))
