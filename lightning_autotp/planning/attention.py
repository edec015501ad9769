"""What attention modules know of their size in other ways than by their weights: on each rank it must be local."""

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from lightning_autotp.introspection.attention import GROUP_SIZES, QUERY_WIDTHS
from lightning_autotp.introspection.forward_source import reads
from lightning_autotp.introspection.names import clean_name
from lightning_autotp.layout.heads import KEY_COUNTS, QUERY_COUNTS, Heads, count_of, share_heads
from lightning_autotp.planning.partition import Cutter
from lightning_autotp.plans.plan import HeadInput, LocalAttribute, ParameterPlan
from lightning_autotp.presets import preset_for


def local_attributes(cutter: Cutter, entries: Mapping[str, ParameterPlan]) -> Iterator[LocalAttribute]:
    """Head counts, group sizes and widths that modules keep, or read from their config, whose projections are cut."""
    for path, heads in _attentions(cutter, entries):
        queries, keys = ([n for _, n in part] for part in share_heads(heads.q, heads.kv, cutter.tp_size))
        known = _known(heads, queries, keys)
        yield from _of_module(path, cutter.modules[path], known)
        for name, child in cutter.modules[path].named_modules(prefix=path):
            if name != path and not any(True for _ in child.parameters()):  # the attention itself, as a module
                yield from _of_module(name, child, known)


def _of_module(
    path: str, module: nn.Module, known: Mapping[str, tuple[int, tuple[int, ...]]]
) -> Iterator[LocalAttribute]:
    for name, (full, local) in known.items():
        is_property = isinstance(getattr(type(module), name, None), property)  # it follows what it is computed from
        if not is_property and count_of(module, name) == full and (name not in QUERY_WIDTHS or name in reads(module)):
            yield LocalAttribute(path, name, full, local)
        # a forward that asks the config for a count: this module gets a config of its own
        config = getattr(module, "config", None)
        if name not in QUERY_WIDTHS and {"config", name} <= reads(module) and count_of(config, name) == full:
            yield LocalAttribute(path, f"config.{name}", full, local)


def head_inputs(
    cutter: Cutter, entries: Mapping[str, ParameterPlan], model_types: Iterable[str]
) -> Iterator[HeadInput]:
    """Arguments that presets know to have one entry for each head of the full model, of modules that are cut."""
    known = [argument for t in model_types if (preset := preset_for(t)) for argument in preset.head_arguments]
    for path, heads in _attentions(cutter, entries):
        queries, _ = share_heads(heads.q, heads.kv, cutter.tp_size)
        for argument in known:
            if re.match(argument.pattern, clean_name(path)):
                yield HeadInput(path, argument.name, argument.dim, heads.q, queries, argument.batched)


def _attentions(cutter: Cutter, entries: Mapping[str, ParameterPlan]) -> Iterator[tuple[str, Heads]]:
    """The modules whose heads are shared out among the ranks."""
    cut = (e for e in entries.values() if e.kind == "column" and e.features is not None and not e.gather_output)
    for path in dict.fromkeys(cutter.holder(entry.module) for entry in cut):
        heads = cutter.heads_around(f"{path}.x" if path else "x")
        if heads is not None:
            yield path, heads


def _known(heads: Heads, queries: list[int], keys: list[int]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Full and local values by attribute name."""
    known: dict[str, tuple[int, tuple[int, ...]]] = {}
    for name in QUERY_COUNTS:
        known[name] = heads.q, tuple(queries)
    for name in KEY_COUNTS:
        known[name] = heads.kv, tuple(keys)
    for name in GROUP_SIZES:
        known[name] = heads.q // heads.kv, tuple(q // k for q, k in zip(queries, keys))
    for name in QUERY_WIDTHS:
        known[name] = heads.q * heads.dim, tuple(q * heads.dim for q in queries)
    return known
