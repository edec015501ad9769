"""The plan: what is cut, how, and why; and how it is shown to people."""

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Optional

from lightning_autotp.introspection.names import folded
from lightning_autotp.layout.layout import Interval, Layout
from lightning_autotp.specs.layer_spec import TPLayerSpec


@dataclass(frozen=True)
class Rule:
    """A spec and where it came from: ``user``, ``preset NAME`` or ``model plan``."""

    spec: TPLayerSpec
    source: str


@dataclass(frozen=True)
class ParameterPlan:
    """What happens to one parameter.

    Args:
        name: its name in the model (wrappers included).
        module: the path of the module that owns it.
        layout: which part of it each rank holds.
        kind: ``column``, ``row``, ``vocabulary`` (an embedding cut along it), ``heads`` (an embedding with a number for
            each head) or ``whole``.
        rule: the pattern that decided, or ``""``.
        source: where the rule came from, or ``""``.
        features: (out, in) features of the linear whose weight it is; None for anything else.
        gather_output: whether the column's output is all-gathered.
        split_input: whether the row's input comes whole.
        grad_allreduce: whether its gradient is summed over the ranks once per optimizer step.
        partial_outputs: how many of the last outputs of the linear have their gradient summed in the backward pass.
        interleaved: whether its parts lie in runs that the cut keeps together.
        tokens: whether ranks have their own tokens on the other side of this cut (sequence parallelism).
        reason: for what stays whole, why.
    """

    name: str
    module: str
    layout: Layout
    kind: str = "whole"
    rule: str = ""
    source: str = ""
    features: Optional[tuple[int, int]] = None
    gather_output: bool = False
    split_input: bool = False
    grad_allreduce: bool = False
    partial_outputs: int = 0
    interleaved: bool = False
    tokens: bool = False
    reason: str = ""

    @property
    def communication(self) -> str:
        """The collectives that this parameter's cut causes in a step."""
        if self.partial_outputs:
            return f"backward: all-reduce of the gradient of the last {self.partial_outputs} outputs"
        if self.grad_allreduce:
            return "step: all-reduce of the gradient"
        shared = "step: all-reduce of the gradient among ranks that share heads" if self.layout.overlaps else ""
        if self.layout.is_replicated or self.kind == "heads":
            return shared
        forward, backward = "", ""
        if self.tokens and self.kind == "column":
            backward = "backward: reduce-scatter of the input's gradient"
            forward = "forward: all-gather of the input's tokens"
        elif self.tokens:
            backward = "backward: all-gather of the output's gradient"
            forward = "forward: reduce-scatter of the output's tokens"
        elif self.kind == "vocabulary" or self.kind == "row" and self.features is not None:
            forward = "forward: all-reduce of the output"
            backward = "backward: all-gather of the input's gradient" if self.split_input else ""
        elif self.kind == "column":
            forward = "forward: all-gather of the output" if self.gather_output else ""
            backward = "backward: all-reduce of the input's gradient" if self.features is not None else ""
        return "; ".join(filter(None, (backward, forward, shared)))


@dataclass(frozen=True)
class LocalAttribute:
    """A head count that a module reads in its forward pass: on each rank it must be the local one.

    A ``name`` like ``config.num_attention_heads`` is read from the module's config, of which it gets a copy.
    """

    module: str
    name: str
    full: int
    local: tuple[int, ...]


@dataclass(frozen=True)
class Boundary:
    """A module whose inside is cut (experts): the gradients of what enters it and its output are summed.

    Args:
        module: its path.
        once: its own whole parameters that add to the output, once and not per rank.
        passing: its children that pass their input on to the output as it is, once and not per rank.
    """

    module: str
    once: tuple[str, ...] = ()
    passing: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeadInput:
    """An argument of a module's forward that has one entry for each head of the full model: each rank takes its own.

    Args:
        module: the path of the module.
        argument: the name of the argument.
        dim: the dim that counts the heads; with ``batched`` it counts them for one sequence after the other.
        heads: the number of heads of the full model.
        parts: each rank's heads.
        batched: whether the dim is [sequences x heads].
    """

    module: str
    argument: str
    dim: int
    heads: int
    parts: tuple[Interval, ...]
    batched: bool = False


@dataclass(frozen=True)
class Region:
    """A part of a block that gets all tokens under sequence parallelism: it is sharded, or it may mix them.

    Args:
        module: its path.
        block: the path of its block.
        reduces: whether its gather and scatter take over the all-reduces of the column and row cuts in it.
        rows: the paths of its row linears.
        sharded: whether anything in it is; otherwise every rank computes all of it.
    """

    module: str
    block: str
    reduces: bool
    rows: tuple[str, ...] = ()
    sharded: bool = True


@dataclass(frozen=True)
class SequencePlan:
    """Where tokens are split and gathered: at the input of the first block, the output of the last, around regions."""

    blocks: tuple[str, ...]
    regions: tuple[Region, ...]


@dataclass(frozen=True)
class PlanRow:
    """One line of :meth:`ShardingPlan.explain`: all parameters that differ only in layer numbers."""

    name: str
    count: int
    shape: tuple[int, ...]
    local_shapes: tuple[tuple[int, ...], ...]
    cut: str
    rule: str
    source: str
    communication: str
    reason: str

    def __str__(self) -> str:
        local = " | ".join(str(list(s)) for s in self.local_shapes)
        times = f" x{self.count}" if self.count > 1 else ""
        why = f"{self.source}: {self.rule}" if self.rule else self.reason
        more = f"; {self.communication}" if self.communication else ""
        return f"{self.name}{times} {list(self.shape)} -> {local} ({self.cut}; {why}{more})"


@dataclass(frozen=True)
class ShardingPlan:
    """Everything that setup does to a model, and everything that was decided on the way.

    Args:
        tp_size: the tensor parallel size.
        parameters: a plan for every name that ``named_parameters(remove_duplicate=False)`` gives.
        siblings: paths of column linears that read one input, group by group; they share one collective.
        attributes: head counts that become local ones.
        boundaries: modules whose inside is cut without layers of its own (experts).
        head_inputs: arguments of which each rank takes its own heads' entries.
        sequence: where tokens are split and gathered, with sequence parallelism.
        warnings: what the user should know; errors in strict mode.
        blockers: why setup refuses this plan, though it can be looked at.
    """

    tp_size: int
    parameters: dict[str, ParameterPlan]
    siblings: tuple[tuple[str, ...], ...] = ()
    attributes: tuple[LocalAttribute, ...] = ()
    boundaries: tuple[Boundary, ...] = ()
    head_inputs: tuple[HeadInput, ...] = ()
    warnings: tuple[str, ...] = ()
    blockers: tuple[str, ...] = ()
    sequence: Optional[SequencePlan] = None

    @property
    def layouts(self) -> dict[str, Layout]:
        """The layout of every parameter, by name."""
        return {name: entry.layout for name, entry in self.parameters.items()}

    def explain(self) -> list[PlanRow]:
        """One row per distinct parameter pattern: layer numbers are folded into ``*``."""
        groups: dict[tuple[str, str], list[ParameterPlan]] = defaultdict(list)
        for entry in self.parameters.values():
            groups[(folded(entry.name), repr(replace(entry, name="", module="")))].append(entry)
        return [_row(name, entries) for (name, _), entries in groups.items()]

    def __str__(self) -> str:
        return "\n".join(str(row) for row in self.explain())


def _row(name: str, entries: list[ParameterPlan]) -> PlanRow:
    first = entries[0]
    layout = first.layout
    shapes = [layout.local_shape(rank) for rank in range(layout.tp_size)]
    if layout.is_replicated:
        cut = "whole"
    else:
        parts = len(layout.parts[0])
        cut = f"{first.kind}, dim {layout.dim}" + (f" in {parts} parts" if parts > 1 else "")
        cut += ", shared by ranks" if layout.overlaps else ""
    return PlanRow(
        name,
        len(entries),
        layout.shape,
        tuple(dict.fromkeys(shapes)) if len(set(shapes)) == 1 else tuple(shapes),
        cut,
        first.rule,
        first.source,
        first.communication,
        first.reason,
    )
