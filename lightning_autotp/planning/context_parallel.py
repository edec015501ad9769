"""Context parallelism: the list of blocks whose tokens the ranks split. Pure."""

from collections.abc import Iterable

from torch import nn

from lightning_autotp.layout.heads import Heads, share_heads
from lightning_autotp.planning.blocks import children_of, lists_around


def blocks_of(model: nn.Module) -> tuple[str, ...]:
    """The paths of the blocks of ``model``: the list of modules that holds the most parameters.

    Outside of it every rank computes all tokens, so another choice would be exact as well, but save less memory.

    Raises:
        ValueError: if there is no list of blocks, or they are never called themselves.
    """
    owners = [path for path, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    lists = lists_around(model, owners)
    if not lists:
        raise ValueError(
            "context_parallel_size: it needs a list of blocks (nn.ModuleList or nn.Sequential), and"
            f" {type(model).__name__} has none; leave it at 1 for this model."
        )
    chosen = max(lists, key=lambda path: sum(p.numel() for p in model.get_submodule(path).parameters()))
    blocks = children_of(model, chosen)
    for path, block in blocks.items():
        if isinstance(block, (nn.ModuleList, nn.ModuleDict)):
            raise ValueError(
                f"context_parallel_size: {path} is a {type(block).__name__}, which is never called itself; make blocks"
                " modules with a forward of their own, or leave it at 1 for this model."
            )
    return tuple(blocks)


def refuse_heads(model: nn.Module, block: str, tp_size: int, cp_size: int) -> None:
    """Refuse heads that do not divide, as far as a config around ``block`` speaks of them, before the first step does.

    Raises:
        ValueError: with the sizes that work.
    """
    path = block
    while path:  # the innermost config is that of the blocks
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        heads = Heads.from_config(getattr(module, "config", None))
        if heads is None or heads.q % heads.kv or tp_size > heads.q:
            continue
        counts = {count for _, count in share_heads(heads.q, heads.kv, tp_size)[0]}
        if any(count % cp_size for count in counts):
            raise ValueError(uneven(f"{path or type(module).__name__} has {heads.q} query heads", counts, cp_size))
        return


def uneven(what: str, counts: Iterable[int], cp_size: int) -> str:
    """The sentence that refuses ``counts`` of heads a tensor parallel rank."""
    each = sorted(set(counts))
    sizes = [str(size) for size in range(1, max(each) + 1) if all(count % size == 0 for count in each)]
    return (
        f"context_parallel_size: {what}, {' or '.join(map(str, each))} on a tensor parallel rank, which {cp_size}"
        f" context parallel ranks do not divide; use {' or '.join(sizes)}, or another autotp_size."
    )
