"""A table of optimizers: what each must see is found by trying, and ten steps of parts are those of whole tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_autotp.distributed.functions import gather_parts
from lightning_autotp.distributed.lockstep import Lockstep
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.layout.layout import Layout, even_widths
from lightning_autotp.optimizers.accept import accept_optimizers
from lightning_autotp.optimizers.owners import owners_of
from lightning_autotp.optimizers.trial import Sees
from lightning_autotp.optimizers.whole import whole_steps
from tests.helpers import own_optimizers as own

SHAPES = {
    "q": (16, 12),
    "k": (8, 12),
    "o": (12, 16),
    "odd": (10, 6),
    "bias": (16,),
    "norm": (12,),
    "experts": (3, 10, 6),
}
MATRICES = ("q", "k", "o", "odd")


def layouts(tp: int) -> dict[str, Layout]:
    """Uneven ones, and two key heads that four ranks share."""
    heads = even_widths(8, tp, 4) if tp < 4 else [(0, 4), (0, 4), (4, 4), (4, 4)]

    def cut(name: str, dim: int) -> Layout:
        return Layout.cut(SHAPES[name], dim, tp, [even_widths(SHAPES[name][dim], tp)])

    return {
        **{"q": cut("q", 0), "k": Layout.cut(SHAPES["k"], 0, tp, [heads]), "o": cut("o", 1), "odd": cut("odd", 0)},
        **{"bias": cut("bias", 0), "norm": Layout.replicated(SHAPES["norm"], tp), "experts": cut("experts", 1)},
    }


Make = Callable[[dict[str, nn.Parameter]], Any]


def plain(kind: Any, **options: Any) -> Make:
    return lambda params: kind(list(params.values()), **options)


def muon_and_adam(params: dict[str, nn.Parameter]) -> Any:
    matrices = [params[name] for name in MATRICES]
    rest = [p for name, p in params.items() if name not in MATRICES]
    return own.SingleFileMuon([{"params": matrices}, {"params": rest, "use_muon": False}])


def hugging_face(**options: Any) -> Make:
    def make(params: dict[str, nn.Parameter]) -> Any:
        return pytest.importorskip("transformers.optimization").Adafactor(list(params.values()), **options)

    return make


TABLE: dict[str, tuple[Make, list[Sees], tuple[str, ...]]] = {
    "AdamW": (plain(torch.optim.AdamW), [Sees.ELEMENT], tuple(SHAPES)),
    "AdamW fused": (plain(torch.optim.AdamW, fused=True, amsgrad=True), [Sees.ELEMENT], tuple(SHAPES)),
    "SGD foreach": (plain(torch.optim.SGD, lr=0.01, momentum=0.9, foreach=True), [Sees.ELEMENT], tuple(SHAPES)),
    "Adagrad": (plain(torch.optim.Adagrad, initial_accumulator_value=0.1), [Sees.ELEMENT], tuple(SHAPES)),
    "torch Adafactor": (plain(torch.optim.Adafactor), [Sees.TENSOR], tuple(SHAPES)),
    "torch Muon": (plain(torch.optim.Muon), [Sees.TENSOR], MATRICES),
    "Hugging Face Adafactor": (hugging_face(), [Sees.TENSOR], tuple(SHAPES)),
    "Hugging Face Adafactor, a given rate": (
        hugging_face(lr=0.01, relative_step=False, scale_parameter=False),
        [Sees.TENSOR],
        tuple(SHAPES),
    ),
    "single-file Muon": (muon_and_adam, [Sees.TENSOR, Sees.ELEMENT], tuple(SHAPES)),
    "LAMB": (plain(own.Lamb), [Sees.TENSOR], tuple(SHAPES)),
    "LARS": (plain(own.Lars, weight_decay=0.1), [Sees.TENSOR], tuple(SHAPES)),
    "LARS that may decay later": (plain(own.Lars, weight_decay=0.0), [Sees.TENSOR], tuple(SHAPES)),
    "LAMB at rate zero": (plain(own.Lamb, lr=0.0), [Sees.TENSOR], tuple(SHAPES)),
    "Shampoo": (plain(own.Shampoo), [Sees.TENSOR], tuple(SHAPES)),
    "SM3": (plain(own.SM3), [Sees.TENSOR], tuple(SHAPES)),
    "StableAdamW": (plain(own.StableAdamW), [Sees.TENSOR], tuple(SHAPES)),
    "one's own": (plain(own.UnitSteps), [Sees.TENSOR], tuple(SHAPES)),
    "Prodigy": (plain(own.Prodigy), [Sees.EVERYTHING], tuple(SHAPES)),
    "a global norm": (plain(own.GlobalNorm), [Sees.EVERYTHING], tuple(SHAPES)),
    "noise": (plain(own.Noisy), [Sees.EVERYTHING], tuple(SHAPES)),
    "LBFGS": (plain(torch.optim.LBFGS, lr=0.1), [Sees.EVERYTHING], tuple(SHAPES)),
    "SAM": (plain(own.Sam), [Sees.EVERYTHING], tuple(SHAPES)),
}


def drawn(seed: int, scale: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: scale * torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in SHAPES.items()}


def ten_steps(make: Make, names: tuple[str, ...], mesh: Mesh | None = None) -> tuple[dict[str, Tensor], Any]:
    """The weights after ten steps; gradients are those of a quadratic and something random, of several scales."""
    lies = None if mesh is None else layouts(mesh.tp_size)

    def part(name: str, full: Tensor) -> Tensor:
        return full.clone() if mesh is None or lies is None else lies[name].shard(full, mesh.tp_rank).clone()

    start = drawn(0, 0.5)
    params = {name: nn.Parameter(part(name, start[name])) for name in names}
    optimizer = make(params)
    if mesh is not None and lies is not None:
        accept_optimizers([optimizer], {params[n]: lies[n] for n in names}, mesh, lambda: None)
    torch.manual_seed(3)
    for step in range(10):
        noise = drawn(step + 1, 10.0 ** (step % 3 - 1))

        def closure(noise: dict[str, Tensor] = noise) -> Tensor:
            for name, p in params.items():
                p.grad = p.detach() * 0.1 + part(name, noise[name])
            return torch.ones((), dtype=torch.float64)

        closure()
        if isinstance(optimizer, own.Sam) and step % 2:
            optimizer.first_step()
            assert all(p.grad is None for p in params.values())
            closure()
            optimizer.second_step()
        else:
            optimizer.step(closure)
    if mesh is None or lies is None:
        return {name: p.detach() for name, p in params.items()}, optimizer
    return {name: gather_parts(p.detach(), lies[name], mesh) for name, p in params.items()}, whole_steps(optimizer)


LONG = ("SGD foreach", "Adagrad", "AdamW fused", "Hugging Face Adafactor, a given rate", "LAMB at rate zero", "LARS")


@pytest.mark.filterwarnings("ignore:.*looks at all parameters at once:UserWarning")
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long if n in LONG else ()) for n in TABLE])
def test_ten_steps_are_those_of_the_unsharded_optimizer(name: str) -> None:
    make, sees, names = TABLE[name]
    want, _ = ten_steps(make, names)
    for tp in (2, 4):
        for got, steps in Lockstep[Any](tp).run(lambda mesh: ten_steps(make, names, mesh)):
            assert list(steps.verdict.sees) == sees
            assert all(torch.allclose(got[n], want[n], rtol=1e-12, atol=1e-13) for n in names), name


def test_owners_share_what_there_is() -> None:
    sizes = [Layout.replicated((n, 4), 4) for n in (10, 20, 20, 30, 30, 5, 5)]
    load = [0] * 4
    assert owners_of(sizes, 4, load) == [2, 2, 3, 0, 1, 3, 3]
    assert max(load) == 120


def test_a_trial_leaves_the_optimizer_and_random_numbers_as_they_were() -> None:
    def work(mesh: Mesh) -> Any:
        p = nn.Parameter(torch.ones(4, 6))
        optimizer = own.Noisy([p], tag={"a": [1, 2]})
        before, state = copy.deepcopy(optimizer.param_groups[0]["tag"]), torch.get_rng_state()
        accept_optimizers([optimizer], {p: Layout.cut((8, 6), 0, 2, [even_widths(8, 2)])}, mesh, lambda: None)
        assert torch.equal(p, torch.ones(4, 6)) and p.grad is None and not optimizer.state
        assert optimizer.param_groups[0]["tag"] == before and torch.equal(state, torch.get_rng_state())

    with pytest.warns(UserWarning, match="Noisy looks at all parameters at once"):
        Lockstep[Any](2).run(work)


def test_groups_that_are_added_later_get_owners_too() -> None:
    def work(mesh: Mesh | None) -> list[Tensor]:
        layout = Layout.cut((8, 6), 0, 2, [even_widths(8, 2)])
        full = [torch.linspace(0, 1, 48).reshape(8, 6), torch.linspace(2, 1, 48).reshape(8, 6)]
        params = [nn.Parameter(f.clone() if mesh is None else layout.shard(f, mesh.tp_rank)) for f in full]
        optimizer = own.Lamb([params[0]])
        if mesh is not None:
            accept_optimizers([optimizer], dict.fromkeys(params, layout), mesh, lambda: None)
        for step in range(4):
            for p in params:
                p.grad = p.detach().cos()
            optimizer.step()
            if step == 1:
                optimizer.add_param_group({"params": [params[1]], "lr": 0.1})
        return [p.detach() if mesh is None else gather_parts(p.detach(), layout, mesh) for p in params]

    want = work(None)
    for got in Lockstep[Any](2).run(work):
        assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(got, want))


class Blocks(Tensor):
    """A tensor of a class of its own, as torchao's 8-bit state is."""


class InBlocks(own.UnitSteps):
    def update(self) -> None:
        super().update()
        for _, p, _, state in self.each():
            state["blocks"] = p.detach().clone().as_subclass(Blocks)


class Sends(own.UnitSteps):
    def update(self) -> None:
        torch.distributed.all_reduce(self.param_groups[0]["params"][0])


class Fails(own.UnitSteps):
    """Raises at the second step, of the rank that owns the parameter."""

    def update(self) -> None:
        super().update()
        for _, p, _, state in self.each():
            state["count"] = state.get("count", 0) + 1
            if p.shape == (8, 6) and state["count"] == 2:
                raise ArithmeticError("singular")


@pytest.mark.ranks(2)
def test_what_sends_by_itself_is_refused_and_a_failure_ends_all_ranks() -> None:
    from lightning_autotp.config.training_config import TPConfig
    from lightning_autotp.distributed.mesh import build_mesh

    mesh = build_mesh(2, TPConfig())
    layout = Layout.cut((8, 6), 0, 2, [even_widths(8, 2)])
    p = nn.Parameter(torch.ones(4, 6))
    with pytest.raises(ValueError, match=r"^Sends is refused.*sends tensors between processes"):
        accept_optimizers([Sends([p])], {p: layout}, mesh, lambda: None)
    with pytest.raises(ValueError, match=r"^InBlocks is refused.*its state is of a class of its own \(Blocks\)"):
        accept_optimizers([InBlocks([p])], {p: layout}, mesh, lambda: None)
    optimizer = Fails([p])
    accept_optimizers([optimizer], {p: layout}, mesh, lambda: None)
    p.grad = torch.ones(4, 6)
    optimizer.step()
    with pytest.raises((ArithmeticError, RuntimeError), match=r"singular|Fails failed on another rank"):
        optimizer.step()
    assert p.shape == p.grad.shape == (4, 6)
