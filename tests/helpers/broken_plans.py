"""Plans with one thing changed on purpose: most become wrong by it, some stay right."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from random import Random

from lightning_autotp.layout.layout import Interval, Layout
from lightning_autotp.plans.plan import HeadInput, LocalAttribute, ParameterPlan, ShardingPlan

Entry = ParameterPlan
Change = Callable[[ShardingPlan, Random], "ShardingPlan | None"]
"""The changed plan; None where a plan has nothing of the kind."""


def _alike(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _chosen(plan: ShardingPlan, draw: Random, fits: Callable[[Entry], bool]) -> set[str]:
    """The name of one entry, or of all that are like it in other blocks."""
    names = [name for name, entry in plan.parameters.items() if fits(entry)]
    if not names:
        return set()
    one = draw.choice(sorted({_alike(name) for name in names}))
    found = [name for name in names if _alike(name) == one]
    return set(found) if draw.random() < 0.5 else {draw.choice(found)}


def _with(plan: ShardingPlan, names: Iterable[str], change: Callable[[Entry], Entry]) -> ShardingPlan | None:
    names = set(names)
    if not names:
        return None
    entries = {name: change(entry) if name in names else entry for name, entry in plan.parameters.items()}
    return replace(plan, parameters=entries)


def _of_modules(plan: ShardingPlan, names: set[str]) -> set[str]:
    """All parameters of the modules of some."""
    modules = {plan.parameters[name].module for name in names}
    return {name for name, entry in plan.parameters.items() if entry.module in modules}


def _is_linear(kind: str) -> Callable[[Entry], bool]:
    return lambda entry: entry.kind == kind and entry.features is not None and entry.name.endswith("weight")


def _is_cut(entry: Entry) -> bool:
    return not entry.layout.is_replicated


def _whole(entry: Entry) -> Entry:
    layout = Layout.replicated(entry.layout.shape, entry.layout.tp_size)
    return replace(entry, layout=layout, kind="whole", gather_output=False, split_input=False, tokens=False)


def drop_grad_allreduce(plan: ShardingPlan, draw: Random) -> ShardingPlan | None:
    names = _chosen(plan, draw, lambda entry: entry.grad_allreduce)
    return _with(plan, names, lambda entry: replace(entry, grad_allreduce=False))


def add_grad_allreduce(plan: ShardingPlan, draw: Random) -> ShardingPlan | None:
    names = _chosen(plan, draw, lambda entry: not _is_cut(entry) and not entry.grad_allreduce)
    return _with(plan, names, lambda entry: replace(entry, grad_allreduce=True))


def _attribute(
    plan: ShardingPlan, draw: Random, change: Callable[[LocalAttribute], LocalAttribute | None]
) -> ShardingPlan | None:
    if not plan.attributes:
        return None
    one, every = draw.choice(plan.attributes), draw.random() < 0.5
    changed = [change(each) if each == one or every and each.name == one.name else each for each in plan.attributes]
    return replace(plan, attributes=tuple(each for each in changed if each is not None))


def drop_attribute(plan: ShardingPlan, draw: Random) -> ShardingPlan | None:
    return _attribute(plan, draw, lambda one: None)


def change_attribute(plan: ShardingPlan, draw: Random) -> ShardingPlan | None:
    by = draw.choice([lambda n: 2 * n, lambda n: n + 1, lambda n: max(n // 2, 1)])
    return _attribute(plan, draw, lambda one: replace(one, local=tuple(map(by, one.local))))


def flip_gather(plan: ShardingPlan, draw: Random) -> ShardingPlan | None:
    names = _of_modules(plan, _chosen(plan, draw, _is_linear("column")))
    return _with(plan, names, lambda entry: replace(entry, gather_output=not entry.gather_output))


def flip_split(plan: ShardingPlan, draw: Random) -> ShardingPlan | None:
    names = _of_modules(plan, _chosen(plan, draw, _is_linear("row")))
    return _with(plan, names, lambda entry: replace(entry, split_input=not entry.split_input))


def change_partial_outputs(plan: ShardingPlan, draw: Random) -> ShardingPlan | None:
    by = draw.choice([lambda n: 0, lambda n: n // 2, lambda n: n + 1])
    names = _chosen(plan, draw, lambda entry: entry.partial_outputs > 0)
    return _with(plan, names, lambda entry: replace(entry, partial_outputs=by(entry.partial_outputs)))


def drop_boundary(plan: ShardingPlan, draw: Random) -> ShardingPlan | None:
    if not plan.boundaries:
        return None
    gone = draw.choice(plan.boundaries)
    return replace(plan, boundaries=tuple(one for one in plan.boundaries if one != gone))


def replicate_one(plan: ShardingPlan, draw: Random) -> ShardingPlan | None:
    names = _chosen(plan, draw, lambda entry: _is_cut(entry) and entry.name.endswith("weight"))
    plan_ = _with(plan, _of_modules(plan, names), _whole)
    if plan_ is None:
        return None
    gone = {plan.parameters[name].module for name in names}
    kept = (tuple(path for path in group if path not in gone) for group in plan.siblings)
    return replace(plan_, siblings=tuple(group for group in kept if group))


def replicate_a_module(plan: ShardingPlan, draw: Random) -> ShardingPlan | None:
    """All that is cut in the module around a row cut: it stays right, but for what else is in there."""
    rows = _chosen(plan, draw, _is_linear("row"))
    if not rows:
        return None
    around = tuple(f"{plan.parameters[name].module.rpartition('.')[0]}." for name in rows)
    inside = {name for name, entry in plan.parameters.items() if entry.module.startswith(around) and _is_cut(entry)}
    made = _with(plan, inside, _whole)
    assert made is not None
    sequence = plan.sequence
    if sequence is not None:
        kept = tuple(one for one in sequence.regions if not f"{one.module}.".startswith(around))
        entries = {
            name: replace(entry, grad_allreduce=True) if entry.module.startswith(around) else entry
            for name, entry in made.parameters.items()
        }
        made = replace(made, parameters=entries, sequence=replace(sequence, regions=kept))
    return replace(
        made,
        siblings=tuple(group for group in plan.siblings if not group[0].startswith(around)),
        attributes=tuple(one for one in plan.attributes if not f"{one.module}.".startswith(around)),
        boundaries=tuple(one for one in plan.boundaries if not f"{one.module}.".startswith(around)),
        head_inputs=tuple(one for one in plan.head_inputs if not f"{one.module}.".startswith(around)),
    )


def swap_ranks(plan: ShardingPlan, draw: Random) -> ShardingPlan | None:
    """Parts of one parameter, or of all, given to the next rank: of all it may stay right."""

    def rolled(entry: Entry) -> Entry:
        parts = entry.layout.parts
        return replace(entry, layout=replace(entry.layout, parts=(*parts[1:], parts[0])))

    def fits(entry: Entry) -> bool:
        return _is_cut(entry) and entry.kind in ("column", "row") and not entry.gather_output and not entry.split_input

    every = {name for name, entry in plan.parameters.items() if fits(entry)}
    return _with(plan, every if draw.random() < 0.5 else _chosen(plan, draw, fits), rolled)


def ignore_shape(plan: ShardingPlan, draw: Random) -> ShardingPlan | None:
    """Packed weights cut as if they were one, or plain ones as if they were two."""

    def fits(entry: Entry) -> bool:
        return entry.kind in ("column", "row") and _is_cut(entry) and len({*entry.layout.widths}) == 1

    def recut(entry: Entry) -> Entry:
        layout = entry.layout
        assert layout.dim is not None
        width = layout.widths[0]
        parts: tuple[tuple[Interval, ...], ...]
        if len(layout.parts[0]) > 1:
            parts = tuple(((rank * width, width),) for rank in range(layout.tp_size))
        else:
            half = width // 2
            second = layout.tp_size * half
            parts = tuple(
                ((rank * half, half), (second + rank * (width - half), width - half)) for rank in range(layout.tp_size)
            )
        return replace(entry, layout=replace(layout, parts=parts))

    names = {
        name
        for name in _chosen(plan, draw, fits)
        if not plan.parameters[name].layout.overlaps and plan.parameters[name].layout.widths[0] > 1
    }
    return _with(plan, names, recut)


def uneven(plan: ShardingPlan, draw: Random) -> ShardingPlan | None:
    """One index more for the first rank, and one less for the second."""

    def fits(entry: Entry) -> bool:
        layout = entry.layout
        return _is_cut(entry) and not layout.overlaps and all(len(part) == 1 for part in layout.parts)

    def recut(entry: Entry) -> Entry:
        first, (start, length), *rest = (part[0] for part in entry.layout.parts)
        parts = [(first[0], first[1] + 1), (start + 1, length - 1), *rest]
        return replace(entry, layout=replace(entry.layout, parts=tuple((part,) for part in parts)))

    return _with(plan, _chosen(plan, draw, fits), recut)


def change_regions(plan: ShardingPlan, draw: Random) -> ShardingPlan | None:
    if plan.sequence is None:
        return None
    regions = list(plan.sequence.regions)
    at = draw.randrange(len(regions))
    kind = draw.choice(["sharded", "reduces", "gone"])
    if kind == "gone":
        del regions[at]
    elif kind == "sharded":
        regions[at] = replace(regions[at], sharded=not regions[at].sharded)
    else:
        regions[at] = replace(regions[at], reduces=not regions[at].reduces)
    return replace(plan, sequence=replace(plan.sequence, regions=tuple(regions)))


def move_sequence(plan: ShardingPlan, draw: Random) -> ShardingPlan | None:
    """Tokens are split later, or gathered earlier."""
    sequence = plan.sequence
    if sequence is None or len(sequence.blocks) < 2:
        return None
    kept = sequence.blocks[1:] if draw.random() < 0.5 else sequence.blocks[:-1]
    return replace(plan, sequence=replace(sequence, blocks=kept))


def no_siblings(plan: ShardingPlan, draw: Random) -> ShardingPlan | None:
    """Each column sends for itself, which is slower and right."""
    if not any(len(group) > 1 for group in plan.siblings):
        return None
    return replace(plan, siblings=tuple((path,) for group in plan.siblings for path in group))


def join_siblings(plan: ShardingPlan, draw: Random) -> ShardingPlan | None:
    """Two groups, which read different inputs, as one."""
    if len(plan.siblings) < 2:
        return None
    first, second = draw.sample(range(len(plan.siblings)), 2)
    rest = [group for at, group in enumerate(plan.siblings) if at not in (first, second)]
    return replace(plan, siblings=(*rest, plan.siblings[first] + plan.siblings[second]))


def change_head_input(plan: ShardingPlan, draw: Random) -> ShardingPlan | None:
    if not plan.head_inputs:
        return None
    at, kind = draw.randrange(len(plan.head_inputs)), draw.choice(["gone", "rolled"])
    inputs: list[HeadInput] = list(plan.head_inputs)
    if kind == "gone":
        del inputs[at]
    else:
        parts = inputs[at].parts
        inputs[at] = replace(inputs[at], parts=(*parts[1:], parts[0]))
    return replace(plan, head_inputs=tuple(inputs))


def reorder(plan: ShardingPlan, draw: Random) -> ShardingPlan | None:
    """Parameters, groups and attributes in another order, and other words: nothing of it means anything."""
    names = list(plan.parameters)
    draw.shuffle(names)
    siblings = draw.sample(plan.siblings, len(plan.siblings))
    entries = {name: replace(plan.parameters[name], reason="", source="", rule="") for name in names}
    return replace(
        plan,
        parameters=entries,
        siblings=tuple(siblings),
        attributes=tuple(draw.sample(plan.attributes, len(plan.attributes))),
    )


CHANGES: tuple[Change, ...] = (
    drop_grad_allreduce,
    add_grad_allreduce,
    drop_attribute,
    change_attribute,
    flip_gather,
    flip_split,
    change_partial_outputs,
    drop_boundary,
    replicate_one,
    replicate_a_module,
    swap_ranks,
    ignore_shape,
    uneven,
    change_regions,
    move_sequence,
    no_siblings,
    join_siblings,
    change_head_input,
    reorder,
)


def broken(plan: ShardingPlan, seed: int) -> tuple[str, ShardingPlan]:
    """A plan with something changed, and what that is; the same for the same seed."""
    draw = Random(seed)
    for change in draw.sample(CHANGES, len(CHANGES)):
        made = change(plan, draw)
        if made is not None and made != plan:
            return change.__name__, made
    raise AssertionError("nothing can be changed")
