"""Does context parallelism give the numbers of the unsharded model: a step by values, on ranks that split its tokens.

Nothing is assumed of a model's blocks: what mixes tokens in another way than by the attention that is exchanged, what
is made of a rank's own number of tokens, and losses collected inside of blocks, change the loss or a gradient here.

A model that is too large for it is judged by a small one of its config, if all that is in its blocks is in the small
one's as well: the step around the blocks sees whole batches.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Optional

import torch
from torch import Tensor, nn

from lightning_autotp.compat import initializes_others, tree_map
from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.diagnostics import Diagnostic
from lightning_autotp.distributed.lockstep import Lockstep
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.introspection.tokenwise import is_tokenwise
from lightning_autotp.layout.layout import Layout
from lightning_autotp.model_sources.small import small_of
from lightning_autotp.planning.context_parallel import blocks_of
from lightning_autotp.plans.plan import ParameterPlan, ShardingPlan
from lightning_autotp.proof.compared import Compared
from lightning_autotp.proof.copying import alias_copy, own_copy
from lightning_autotp.proof.draws import Draws
from lightning_autotp.proof.error_metrics import Precision
from lightning_autotp.proof.processes import WithoutProcesses
from lightning_autotp.proof.randomness import without_randomness
from lightning_autotp.proof.rounded import Rounded
from lightning_autotp.proof.step import Seen, Step, loss_step
from lightning_autotp.proof.values import NotRunError, computing, disturb, judge, quiet
from lightning_autotp.proof.verdict import Verdict, worst
from lightning_autotp.sharding.shard import shard
from lightning_autotp.training.gradients import TPGradients
from lightning_autotp.training.norms import Norms

MOST_RANKS = 8
"""Ranks that are run, tensor times context parallel ones; of more the context parallel ones alone."""

_UNKNOWN = "context_parallel_size: it cannot be shown that this step computes what the unsharded one does"


def prove_context(model: nn.Module, plan: ShardingPlan, switches: TPTrainingConfig, step: Step) -> Verdict:
    """Run ``step`` unsharded and on ranks that split its tokens, and compare losses, gradients and outputs.

    Args:
        model: an unsharded copy with values, on the CPU; it is changed.
        plan: how it is sharded.
        switches: the config.
        step: the step; it is run on copies.

    Raises:
        NotRunError: if the unsharded step does not run.
    """
    disturb(model)
    if plan.tp_size * switches.context_parallel_size > MOST_RANKS:
        plan = _whole(model)
    precisions: tuple[Precision, ...] = ("fp64", "fp32")
    for precision in precisions:
        try:
            return _compare(model, plan, switches, step, precision)
        except NotRunError as error:
            reason = error
    raise reason


def prove_small(model: nn.Module, switches: TPTrainingConfig) -> Verdict:
    """Prove the blocks of a large Hugging Face model by a small one of its config.

    Args:
        model: the unsharded model, of which values do not count.
        switches: the config.

    Raises:
        NotRunError: if there is no such model; says why.
    """
    blocks = blocks_of(model)
    named = [(path, module) for path, module in model.named_modules() if initializes_others(module)]
    around = [module for path, module in named if f"{blocks[0]}.".startswith(f"{path}." if path else "")]
    if not around:
        raise NotRunError("it is too large to be run on copies, and no Hugging Face model.")
    small = _small(around)
    known = {type(m) for path in blocks_of(small) for m in small.get_submodule(path).modules()}
    for path in blocks:
        for name, module in model.get_submodule(path).named_modules(prefix=path):
            if type(module) not in known and not _is_known(module) or "forward" in vars(module):
                raise NotRunError(f"it is too large to be run on copies, and what {name} computes is not its config's.")
    return prove_context(small, _whole(small), switches, loss_step(_loss, _tokens(small, switches)))


def _is_known(module: nn.Module) -> bool:
    """Whether a module that is not of a model's config works on each token, given that those inside of it do."""
    held = isinstance(module, (nn.ModuleDict, nn.ModuleList, nn.ParameterDict))
    return held or hasattr(module, "reset_lora_parameters") or is_tokenwise(module)


def _small(models: list[nn.Module]) -> nn.Module:
    """A small model of the first that there is one of: those around it may be of another library's (adapters')."""
    for model in models:
        try:
            return small_of(model)
        except Exception as caught:
            error = caught
    raise NotRunError(f"there is no small model of its config ({type(error).__name__}: {error}).") from error


def unknown(reason: str) -> Verdict:
    """The verdict where nothing was shown: nobody would see at run time that it is wrong, so it is no mere warning."""
    finding = Diagnostic(
        "error", _UNKNOWN, f"{reason} Leave it at 1, or go on without a proof by `proof='warn'` or `proof='off'`."
    )
    return Verdict("refuted", (finding,))


def shorter(batch: Any, tokens: int) -> Iterator[Any]:
    """``batch`` with the first, and with the last, ``tokens`` of its sequences, if they are longer; then as it is."""
    sizes: list[int] = []

    def count(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim > 1:
            sizes.append(value.shape[1])
        return value

    tree_map(count, batch)
    length = max(sizes, key=sizes.count, default=0)

    def taken(value: Any, start: int) -> Any:
        if isinstance(value, Tensor):
            for dim in range(1, value.ndim):
                if value.shape[dim] == length:
                    value = value.narrow(dim, start, tokens)
        return value

    if length > tokens:
        for start in (0, length - tokens):
            yield tree_map(lambda value, start=start: taken(value, start), batch)
    yield batch


def few_tokens(cp_size: int) -> int:
    """A few tokens, which the ranks do not divide."""
    return max(4 * cp_size + 1, 17)


def _whole(model: nn.Module) -> ShardingPlan:
    """The plan of one tensor parallel rank."""
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        layout = Layout.replicated(tuple(parameter.shape), 1)
        found[name] = ParameterPlan(name, name.rpartition(".")[0], layout)
    return ShardingPlan(1, found)


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    output: Any = model(**batch)
    loss: Optional[Tensor] = getattr(output, "loss", None)
    if loss is not None:
        return loss
    first: Tensor = output[0]
    weights = torch.randn(first.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (first * weights.to(first)).sum()


def _tokens(model: Any, switches: TPTrainingConfig) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    high = model.config.get_text_config().vocab_size
    tokens = torch.randint(high, (3, few_tokens(switches.context_parallel_size)), generator=draw)
    batch = {"input_ids": tokens}
    return {**batch, "labels": tokens} if "labels" in inspect.signature(type(model).forward).parameters else batch


def _compare(
    model: nn.Module, plan: ShardingPlan, switches: TPTrainingConfig, step: Step, precision: Precision
) -> Verdict:
    lines: list[str] = []
    rounded = Rounded()
    full: list[Seen] = []

    with quiet(), computing(model, precision) as cast:

        def casted(batch: Any) -> Any:
            return tree_map(cast, batch)

        def unsharded(mesh: Mesh) -> Seen:
            full.append(Seen(own_copy(model), cast=casted))
            with WithoutProcesses(), without_randomness(lines, Draws(full[0].model)), rounded:
                step(full[0])
            return full[0]

        def sharded(mesh: Mesh) -> Seen:
            copy = alias_copy(model)
            flags = [module.training for module in copy.modules()]
            found = shard(copy, plan, mesh, switches, device=torch.device("cpu"), training=True)
            for module, flag in zip(copy.modules(), flags):
                module.training = flag
            for parameter in copy.parameters():
                parameter.data = parameter.data.clone()
            gradients = TPGradients(copy, found)

            def complete() -> None:
                _average(copy, mesh)
                gradients.complete()

            seen = Seen(copy, complete, casted, norms=Norms(copy, gradients))
            with WithoutProcesses(), without_randomness([], Draws(copy)):
                step(seen)
            gradients.remove()
            return seen

        try:
            Lockstep[Seen](1).run(unsharded)
        except Exception as error:
            raise NotRunError(f"it cannot be run on a copy ({type(error).__name__}: {error}).") from error
        if not all(bool(torch.isfinite(loss).all()) for loss in full[0].losses):
            raise NotRunError("its loss is not finite.")
        if not full[0].losses:
            raise NotRunError("it gives no loss.")

        def judged(ranks: tuple[Seen, ...], error: Optional[BaseException] = None) -> Verdict:
            return judge(Compared(model, precision, full[0], ranks, error, (), double=not rounded.found), plan)

        try:
            ranks = Lockstep[Seen](plan.tp_size, cp_size=switches.context_parallel_size).run(sharded)
        except Exception as error:
            return _named(judged((), error))
        size = plan.tp_size
        return _named(worst(judged(tuple(ranks[at : at + size])) for at in range(0, len(ranks), size)))


def _named(verdict: Verdict) -> Verdict:
    """The findings, said to be of this."""
    if verdict.kind == "proved":
        return verdict
    of_tokens = "the ranks of context_parallel_size, which split its tokens, compute something else"
    findings = (Diagnostic("error", "the step", f"{of_tokens}; leave it at 1 for this model."), *verdict.findings[:6])
    return replace(verdict, kind="refuted", findings=findings)


@torch.no_grad()
def _average(model: nn.Module, mesh: Mesh) -> None:
    """Average gradients over the context parallel ranks, as data parallelism does."""
    held = list(model.parameters())
    everyones = mesh.collectives.gather_objects([parameter.grad is not None for parameter in held], "cp")
    for parameter, has in zip(held, map(any, zip(*everyones))):
        if has:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = mesh.collectives.all_reduce(grad.contiguous(), "cp") / mesh.cp_size
