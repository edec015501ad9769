"""Weights that are there before setup: what ranks hold alike is cut in place, the rest is rank 0's, in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightning_autotp import TPTrainingConfig, make_plan
from lightning_autotp.distributed.collectives import Over
from lightning_autotp.distributed.lockstep import Lockstep, LockstepCollectives
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.layout.layout import Box
from lightning_autotp.model_sources.small import small_config, small_model
from lightning_autotp.sharding import agreement, full_models
from lightning_autotp.sharding.agreement import digest
from lightning_autotp.sharding.shard import shard

SWITCHES = TPTrainingConfig(autotp_size=2)


def llama(seed: int = 0, **options: Any) -> Any:
    config = small_config("llama")
    config.update(options)
    return small_model(config, seed=seed)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The bytes of each tensor that any rank broadcasts."""
    found: list[int] = []
    broadcast = LockstepCollectives.broadcast

    def counted(self: LockstepCollectives, x: Tensor, over: Over = "world") -> Tensor:
        found.append(x.numel())
        return broadcast(self, x, over)

    monkeypatch.setattr(LockstepCollectives, "broadcast", counted)
    yield found


def cut(model: nn.Module, mesh: Mesh) -> dict[str, Tensor]:
    shard(model, make_plan(model, SWITCHES), mesh, SWITCHES, device=torch.device("cpu"))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_models_that_are_alike_are_cut_without_sending_anything(sent: list[int], tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    full = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    layouts = make_plan(AutoModelForCausalLM.from_pretrained(tmp_path), SWITCHES).layouts
    ranks = Lockstep[Any](2).run(lambda mesh: cut(AutoModelForCausalLM.from_pretrained(tmp_path), mesh))
    for rank, found in enumerate(ranks):
        assert all(torch.equal(part, layouts[name].shard(full[name], rank)) for name, part in found.items())
    assert sent == []
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_what_differs_is_rank_zeros_and_travels_in_small_pieces(
    sent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "LARGEST_PIECE", 1000)
    full = dict(llama().named_parameters())
    layouts = make_plan(llama(), SWITCHES).layouts

    def rank(mesh: Mesh) -> tuple[dict[str, Tensor], bool]:
        model: Any = llama()
        with torch.no_grad():
            if mesh.tp_rank == 1:
                model.model.layers[0].self_attn.o_proj.weight[3, 5] += 1
                model.model.norm.weight.zero_()
                model.model.rotary_emb.inv_freq.zero_()
        own = model.model.layers[0].self_attn.o_proj.weight.data
        untouched = own.clone()
        found = cut(model, mesh)
        assert torch.equal(model.model.rotary_emb.inv_freq, llama().model.rotary_emb.inv_freq)
        return found, torch.equal(own, untouched)

    for number, (found, is_untouched) in enumerate(Lockstep[Any](2).run(rank)):
        assert is_untouched  # rank 0's weights are not written over this rank's own, which may be a file's
        assert all(torch.equal(part, layouts[name].shard(full[name], number)) for name, part in found.items())
    assert max(sent) <= 1000 and sum(sent) == 2 * 4 * (64 * 64 + 64 + 4)


def test_a_rank_that_has_no_weights_takes_those_of_rank_zero() -> None:
    full = dict(llama(seed=1).named_parameters())
    layouts = make_plan(llama(), SWITCHES).layouts

    def rank(mesh: Mesh) -> dict[str, Tensor]:
        model = llama(seed=1)
        return cut(model if mesh.tp_rank == 0 else model.to("meta"), mesh)

    for number, found in enumerate(Lockstep[Any](2).run(rank)):
        assert all(torch.equal(part, layouts[name].shard(full[name], number)) for name, part in found.items())


def test_ranks_with_different_models_are_told_so() -> None:
    def rank(mesh: Mesh) -> None:
        cut(llama(attention_bias=mesh.tp_rank == 1), mesh)

    with pytest.raises(ValueError, match="the ranks built different models"):
        Lockstep[Any](2).run(rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_digests_tell_single_elements_and_their_places(dtype: torch.dtype) -> None:
    base = (torch.arange(999) % 2).to(dtype)
    others = [base.clone() for _ in range(4)]
    others[0][0] = 1
    others[1][998] = 1
    others[2][:2] = others[2][:2].flip(0)
    others[3][500:502] = others[3][500:502].flip(0)
    assert digest(base) == digest(base.clone()) == digest(torch.cat([base[:1], base])[1:])
    assert len({digest(one) for one in [base, *others]}) == 5


def test_pieces_tile_a_box_in_contiguous_runs() -> None:
    full = torch.arange(2 * 5 * 7).view(2, 5, 7)
    for most in (1, 3, 7, 20, 35, 1000):
        pieces = list(Box.full(full.shape).pieces(most))
        assert torch.equal(torch.cat([piece.view(full).flatten() for piece in pieces]), full.flatten())
        assert all(piece.view(full).is_contiguous() and piece.view(full).numel() <= most for piece in pieces)


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["as in the file", "converted"])
def test_a_model_that_is_held_needlessly_is_named_with_the_way_out(
    dtype: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(full_models, "NEEDLESS", 2**16)
    llama().to(torch.bfloat16).save_pretrained(tmp_path)
    Lockstep[Any](2).run(lambda mesh: cut(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype), mesh))
    told = [str(warning.message) for warning in recwarn if "every process holds all of this model" in str(warning)]
    assert len(set(told)) == (0 if dtype is None else 1)
    assert all(f"lightning_autotp.from_pretrained(LlamaForCausalLM, '{tmp_path}', ...)" in one for one in told)
