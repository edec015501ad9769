"""How a parameter is cut by the rule that matches it: kinds of layers, widths in whole heads, layouts. Pure."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Optional

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_autotp.introspection.attention import heads_of, role_of
from lightning_autotp.introspection.forward_source import delegates, passes_input
from lightning_autotp.introspection.layers import features_of, is_conv1d
from lightning_autotp.introspection.names import clean_name, folded, join_path
from lightning_autotp.layout.fused import Fused, fused_parameter, sub_parameters
from lightning_autotp.layout.heads import Heads, share_heads
from lightning_autotp.layout.layout import Interval, Layout, even_widths
from lightning_autotp.planning.rules import Match, Matcher
from lightning_autotp.plans.plan import ParameterPlan
from lightning_autotp.specs.layer_spec import PartitionType, TPLayerSpec
from lightning_autotp.specs.shape import resolve_shape

_ADAPTER = re.compile(r"(.+)\.(lora_A|lora_B)\.[^.]+")
"""The path of one half of a low-rank adapter: the wrapped layer, and which half."""

_PLAIN = ("FalconLinear",)
"""Subclasses of nn.Linear whose forward is written anew and computes the same."""


class Cutter:
    """Decides about one parameter after the other."""

    def __init__(self, matcher: Matcher, tp_size: int) -> None:
        self.matcher = matcher
        self.modules = matcher.modules
        self.tp_size = tp_size
        self.blockers: list[str] = []
        self._heads: dict[str, Optional[Heads]] = {}

    def decide(self, name: str, path: str, local_name: str, parameter: nn.Parameter) -> ParameterPlan:
        """What happens to ``parameter``, called ``local_name`` in the module at ``path``.

        Raises:
            ValueError: if the rule for it cannot be applied to it.
        """
        module = self.modules[path]
        features = features_of(module) if local_name == "weight" else None
        whole = ParameterPlan(name, path, Layout.replicated(parameter.shape, self.tp_size), features=features)
        adapter = _ADAPTER.fullmatch(path)
        if adapter is not None and hasattr(self.modules[adapter[1]], "base_layer"):
            return self._adapter(whole, adapter[1], adapter[2], local_name)
        if isinstance(module, ParametrizationList):
            self._refuse_parametrized(path)
        linear = features_of(module) is not None
        follows_weight = local_name == "bias" and linear
        found = self.matcher.parameter(join_path(path, "weight") if follows_weight else name)
        if found is None:
            return replace(whole, reason="no rule matches" if parameter.ndim > 1 else "not a matrix, no rule matches")
        spec = found.spec
        decided = replace(whole, rule=found.pattern, source=found.source)
        where = _where(name, found)
        if spec.partition_type is PartitionType.SKIP:
            return self._skipped(decided, spec, module, local_name, where)
        if isinstance(module, nn.Embedding):
            return self._embedding(decided, spec, module, where)
        if linear and local_name in ("weight", "bias"):
            self._refuse_wrapped(path, where)
            return self._linear(decided, spec, path, local_name, where)
        return self._bare(decided, spec, where)

    # -- what is left whole -------------------------------------------------------------------------------------------

    def _skipped(
        self, entry: ParameterPlan, spec: TPLayerSpec, module: nn.Module, local_name: str, where: str, at: str = ""
    ) -> ParameterPlan:
        """A parameter of ``module``, which is at the path ``at``, under a skip rule."""
        entry = replace(entry, grad_allreduce=spec.grad_allreduce, reason="a skip rule")
        if spec.partial_outputs is None or local_name != "weight":
            return entry
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{where}: partial_outputs needs an nn.Linear, this is {type(module).__name__}.")
        count = spec.partial_outputs
        if isinstance(count, str):
            parent = self.modules[self.holder(at or entry.module)]
            holders = (parent, getattr(parent, "config", None), self.matcher.config_around(entry.name))
            found = next((getattr(holder, count) for holder in holders if hasattr(holder, count)), None)
            if not isinstance(found, int):
                raise ValueError(
                    f"{where}: partial_outputs: neither the module around nor its config has a number {count!r}."
                )
            count = found
        if count > module.out_features:
            raise ValueError(f"{where}: partial_outputs: {count} is more than the {module.out_features} outputs.")
        return replace(entry, partial_outputs=count)

    def _refuse_parametrized(self, path: str) -> None:
        # the rule for the weight that is computed from this; path: LAYER.parametrizations.weight
        layer, _, computed = path.rpartition(".parametrizations.")
        found = self.matcher.parameter(f"{layer}.{computed}" if computed else path)
        if found is not None and found.spec.partition_type is not PartitionType.SKIP:
            raise ValueError(
                f"{_where(f'{layer}.{computed}', found)}: this weight is parametrized; remove the parametrization, or"
                " add a skip rule."
            )

    def _refuse_wrapped(self, path: str, where: str) -> None:
        """Refuse layers inside PEFT wrappers that compute with the weight in ways that a cut would break."""
        if not f".{path}".endswith(".base_layer"):
            return
        wrapper = self.modules[path.rpartition(".")[0]]
        if not hasattr(wrapper, "lora_A"):
            self.blockers.append(
                f"{folded(where)}: layers that PEFT wraps as {type(wrapper).__module__}.{type(wrapper).__name__} cannot"
                " be cut exactly; use LoRA, or add a skip rule for them."
            )
        elif any(dict(getattr(wrapper, "use_dora", {})).values()) or getattr(wrapper, "lora_variant", None):
            self.blockers.append(
                f"{folded(where)}: LoRA variants that read the weight themselves (DoRA and others) cannot be cut"
                " exactly; use plain LoRA or rsLoRA, or add a skip rule for these layers."
            )

    # -- layers -------------------------------------------------------------------------------------------------------

    def _adapter(self, entry: ParameterPlan, wrapped: str, half: str, local_name: str) -> ParameterPlan:
        """Half of a low-rank adapter: along its layer's cut it is cut alike, the other half stays whole."""
        found = self.matcher.parameter(f"{wrapped}.weight")
        base = self.modules[f"{wrapped}.base_layer"]
        if found is None:
            return replace(entry, reason="its layer is whole")
        if found.spec.partition_type is PartitionType.SKIP:  # it sees what its layer sees
            whole = self._skipped(entry, found.spec, base, local_name, _where(entry.name, found), at=wrapped)
            count = whole.partial_outputs if half == "lora_B" else 0
            return replace(whole, partial_outputs=count, reason="its layer is whole")
        if features_of(base) is None:
            return replace(entry, reason="its layer is no linear")
        entry = replace(entry, rule=found.pattern, source=found.source)
        cut = "lora_B" if found.spec.partition_type is PartitionType.COLUMN else "lora_A"
        if half != cut:
            return replace(entry, reason=f"the adapter is cut in {cut}")
        where = _where(entry.name, found)
        return self._linear(entry, found.spec, entry.module, local_name, where, like=f"{wrapped}.base_layer")

    def _embedding(self, entry: ParameterPlan, spec: TPLayerSpec, module: nn.Embedding, where: str) -> ParameterPlan:
        _refuse_bypassed(module, nn.Embedding.forward, where, whole_output=True)
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                raise ValueError(
                    f"{where}: an embedding with `{option}` cannot be cut exactly; add a skip rule for it."
                )
        if spec.partition_type is PartitionType.ROW:
            if spec.shape is not None:
                raise ValueError(f"{where}: a vocabulary has no fused parts; leave out `shape`.")
            return replace(entry, kind="vocabulary", layout=self._plain(entry.layout.shape, 0, where))
        if spec.gather_output:
            return replace(entry, kind="column", layout=self._plain(entry.layout.shape, 1, where), gather_output=True)
        heads = self.heads_around(entry.module)
        if heads is None or module.embedding_dim % heads.q:
            raise ValueError(
                f"{where}: a column cut of an embedding gives each rank some of its features, and nothing closes it;"
                " set `gather_output: true`, or cut the vocabulary with partition_type 'row'."
            )
        # a number for each head, as T5's position bias is: a rank needs those of its own heads
        widths = self._widths(module.embedding_dim, heads)
        return replace(entry, kind="heads", layout=self._cut(entry.layout.shape, 1, widths, where))

    def _linear(
        self, entry: ParameterPlan, spec: TPLayerSpec, path: str, local_name: str, where: str, like: str = ""
    ) -> ParameterPlan:
        """A weight or bias of the linear at ``path``; its heads and fused parts are those of the layer at ``like``."""
        module = self.modules[path]
        is_row = spec.partition_type is PartitionType.ROW
        own = type(module).forward if is_conv1d(module) else nn.Linear.forward
        whole_input = not is_row or spec.split_input
        _refuse_bypassed(module, own, where, is_row or spec.gather_output, whole_input)
        if isinstance(self.modules[path.rpartition(".")[0]], nn.MultiheadAttention):
            raise ValueError(
                f"{where}: nn.MultiheadAttention reads the weights of this layer without calling it, so it cannot be"
                " cut; add a skip rule, or use separate projections."
            )
        if is_row and local_name == "bias":
            return replace(entry, kind="row", split_input=spec.split_input, reason="added once, after the sum")
        features = features_of(module)
        assert features is not None
        heads = None if spec.gather_output or spec.split_input else self.heads_around(like or path)
        # what a row cut reads is the output of all query heads
        role = "q" if is_row else role_of(clean_name(like or path).rpartition(".")[2])
        layout = self._linear_layout(features, spec, heads, role, where)
        if local_name == "bias":
            layout = layout.along(features[0])
        elif is_conv1d(module):
            layout = Layout((features[1], features[0]), self.tp_size, 1 - (layout.dim or 0), layout.parts)
        return replace(
            entry,
            kind="row" if is_row else "column",
            layout=layout,
            gather_output=spec.gather_output,
            split_input=spec.split_input,
        )

    def _linear_layout(
        self, features: tuple[int, int], spec: TPLayerSpec, heads: Optional[Heads], role: Optional[str], where: str
    ) -> Layout:
        """The layout [out, in] of a linear's weight."""
        dim = 1 if spec.partition_type is PartitionType.ROW else 0
        fused = Fused((features[dim],))
        if spec.shape is not None:
            try:
                fused = sub_parameters(resolve_shape(spec.shape, heads), spec.cut_dim, features, dim)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        parts = spec.shape[spec.cut_dim] if spec.shape is not None else ()
        roles = [size if isinstance(size, str) else None for size in parts] if isinstance(parts, tuple) else []
        roles = roles or [role] * len(fused.sizes)
        try:
            widths = [w for size, of in zip(fused.sizes, roles) for w in self._widths(size, heads, fused.unit, of)]
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        return self._cut(features, dim, widths, where, fused.repeat)

    def _bare(self, entry: ParameterPlan, spec: TPLayerSpec, where: str) -> ParameterPlan:
        """A parameter that is no layer's weight: of experts, or a vector with a number for each head."""
        if ".base_layer." in f".{entry.module}.":
            self.blockers.append(
                f"{folded(where)}: adapters on parameters (PEFT's target_parameters) cannot be cut with them; adapt"
                " linear layers (target_modules), or add a skip rule for the parameter."
            )
        shape = entry.layout.shape
        is_row = spec.partition_type is PartitionType.ROW
        if spec.gather_output or spec.split_input:
            raise ValueError(
                f"{where}: a parameter of {type(self.modules[entry.module]).__name__} has no input or output of its own"
                " to split or gather; leave out the flag, or add a skip rule."
            )
        if is_row and (len(shape) == 1 or entry.name.endswith("bias")):
            return replace(entry, kind="row", reason="added once, before the sum")
        dim = spec.cut_dim if spec.shape is not None else len(shape) - 1 if is_row else max(len(shape) - 2, 0)
        heads = self.heads_around(entry.name)
        fused = Fused((shape[dim],))
        if spec.shape is not None:
            try:
                fused = fused_parameter(resolve_shape(spec.shape, heads), dim, shape)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        role = "q" if heads is not None and len(shape) == 1 and shape[0] == heads.q else None
        try:
            widths = [part for size in fused.sizes for part in self._widths(size, heads, fused.unit, role)]
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        layout = self._cut(shape, dim, widths, where)
        return replace(entry, kind="row" if is_row else "column", layout=layout, interleaved=fused.unit > 1)

    # -- widths -------------------------------------------------------------------------------------------------------

    def _plain(self, shape: tuple[int, ...], dim: int, where: str) -> Layout:
        return self._cut(shape, dim, [even_widths(shape[dim], self.tp_size)], where)

    def _widths(
        self, size: int, heads: Optional[Heads], unit: int = 1, role: Optional[str] = None
    ) -> list[tuple[Interval, ...]]:
        """How ``size`` is shared among the ranks: in whole heads where it is that of all heads, evenly elsewhere.

        One set of intervals for each sub-parameter that has to be cut by itself; mostly that is one. ``role`` says of
        which heads it is, ``"q"`` or ``"kv"``, where that is known; sizes may be ambiguous.
        """
        if heads is None:
            return [even_widths(size, self.tp_size, unit)]
        queries, keys = share_heads(heads.q, heads.kv, self.tp_size)
        if role is None and size == heads.size("q") + 2 * heads.size("kv") and heads.kv < heads.q:
            return self._grouped(heads, queries, keys)
        of_keys = size in (heads.kv, heads.kv * heads.dim, heads.kv * heads.v_dim) and heads.kv < heads.q
        if role == "kv" and size % heads.kv == 0 or role is None and of_keys:
            return [_scaled(keys, _run(size // heads.kv, unit))]
        if size % heads.q:
            return [even_widths(size, self.tp_size, unit)]
        return [_scaled(queries, _run(size // heads.q, unit))]

    def _grouped(
        self, heads: Heads, queries: Sequence[Interval], keys: Sequence[Interval]
    ) -> list[tuple[Interval, ...]]:
        """One projection that holds, for each key head, its query heads, the key and the value (Falcon's)."""
        group = heads.q // heads.kv
        widths: list[tuple[Interval, ...]] = []
        for head in range(heads.kv):
            held = [start <= head < start + length for start, length in keys]
            first = [max(start, head * group) for start, _ in queries]
            last = [min(start + length, (head + 1) * group) for start, length in queries]
            mine = [(a - head * group, b - a) if h else (0, 0) for a, b, h in zip(first, last, held)]
            both = [(0, 2) if h else (0, 0) for h in held]
            widths += [_scaled(mine, heads.dim), _scaled(both, heads.dim)]
        return widths

    def _cut(
        self,
        shape: tuple[int, ...],
        dim: int,
        widths: Sequence[Sequence[Interval]],
        where: str,
        repeat: int = 1,
    ) -> Layout:
        layout = Layout.cut(shape, dim, self.tp_size, widths, repeat)
        if self.tp_size > 1 and 0 in layout.widths:
            most = sum(width > 0 for width in layout.widths)
            raise ValueError(
                f"{where}: cut for {self.tp_size} ranks, {self.tp_size - most} of them would hold nothing of"
                f" {list(layout.shape)}; use a tensor parallel size of at most {most}, or a skip rule."
            )
        return layout

    # -- heads --------------------------------------------------------------------------------------------------------

    def heads_around(self, path: str) -> Optional[Heads]:
        """The heads of the module that holds the layer or parameter at ``path``; None if it is no attention."""
        parent = self.holder(path)
        if parent not in self._heads:
            module = self.modules[parent]
            widths: dict[str, int] = {}
            for name, child in module.named_children():
                child = getattr(child, "base_layer", child)
                features = features_of(child)
                if features is not None:
                    widths |= self._column_parts(join_path(parent, name), name, features)
            config = self.matcher.config_around(path)
            self._heads[parent] = heads_of(module, config, widths)
        return self._heads[parent]

    def holder(self, path: str) -> str:
        """The path of the module that works with the layer at ``path``: its parent, wrappers left out."""
        parent = path.rpartition(".")[0]
        return parent.rpartition(".")[0] if hasattr(self.modules[parent], "base_layer") else parent

    def _column_parts(self, path: str, name: str, features: tuple[int, int]) -> dict[str, int]:
        """Sub-parameter sizes of a column linear by name, as far as they are known before its heads are; else none."""
        found = self.matcher.parameter(f"{path}.weight")
        if found is None or found.spec.partition_type is not PartitionType.COLUMN:
            return {}
        if found.spec.shape is None:
            return {name: features[0]}
        try:
            fused = sub_parameters(resolve_shape(found.spec.shape, None), found.spec.cut_dim, features, 0)
        except ValueError:
            return {}
        return {f"{name}[{at}]": size for at, size in enumerate(fused.sizes)}


def _run(head: int, unit: int) -> int:
    """The size of a head's part, which must not cut across runs of ``unit``."""
    if head % unit:
        raise ValueError(f"shape: runs of {unit} features do not fit into the {head} features of a head.")
    return head


def _scaled(parts: Sequence[Interval], by: int) -> tuple[Interval, ...]:
    return tuple((start * by, length * by) for start, length in parts)


def _where(name: str, found: Match) -> str:
    return f"{name} (rule {found.pattern!r}, {found.spec.partition_type.value}, from {found.source})"


def _refuse_bypassed(
    module: nn.Module, forward: object, where: str, whole_output: bool, whole_input: bool = True
) -> None:
    """Refuse a layer whose own class computes something else than its base does, or whose weight is computed.

    A class that only works on what the base class returns (a scaled embedding) is fine where that is whole, and where
    what it is given is whole, too, or goes to the base class as it came.
    """
    own = type(module)
    if "forward" in vars(module):
        raise ValueError(
            f"{where}: the forward of this layer was replaced on the object, and a cut would go unseen by it; remove"
            " what replaced it (hooks of other libraries do), or add a skip rule."
        )
    same = own.forward is forward or own.__name__ in _PLAIN
    untouched = whole_input or passes_input(own)
    if not same and not (whole_output and untouched and delegates(own)):
        raise ValueError(
            f"{where}: {type(module).__name__} has a forward of its own, which a cut would bypass; add a skip rule."
        )
    if hasattr(module, "parametrizations"):
        raise ValueError(f"{where}: this weight is parametrized; remove the parametrization, or add a skip rule.")
