"""``parallelize`` in a plain torch loop, that of the example: parity with the unsharded run, and after resuming."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.optim import AdamW, Optimizer

from lightning_autotp import parallelize
from lightning_autotp.examples import torch_loop
from lightning_autotp.recipe.parallelized import Parallelized
from lightning_autotp.training.consistency import DisagreementError
from tests.helpers.closeness import assert_close
from tests.helpers.models import tiny_llama
from tests.helpers.rank_pool import rank_device, run_ranks
from tests.helpers.sharded_runs import part_of

STEPS, BATCH, VOCAB = torch_loop.STEPS, 6, 131
LLAMA: dict[str, Any] = {"kv_heads": 2, "vocab": VOCAB}
EXACT: dict[str, Any] = {"lr": 1e-3, "eps": 1e-5}


@dataclass
class Record:
    """What a run did: the loss of every forward pass, the clipped gradients of every step, weights after it."""

    losses: list[Tensor] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)

    def watch(self, model: nn.Module, optimizer: Optimizer) -> None:
        def before(*_: Any) -> None:
            self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

        def after(*_: Any) -> None:
            self.weights.append({n: p.detach().clone() for n, p in model.named_parameters()})

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)


def rows(steps: int, batch: int = BATCH) -> Tensor:
    """What all replicas together read in ``steps`` steps, ``batch`` rows a forward pass."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(VOCAB, (steps * torch_loop.ACCUMULATE * batch, 12), generator=generator).to(rank_device())


def unsharded(steps: int) -> Record:
    model: Any = tiny_llama(**LLAMA)
    model.to(rank_device())
    record = Record()
    optimizer = AdamW(model.parameters(), **EXACT)
    record.watch(model, optimizer)
    for number, tokens in enumerate(rows(steps).split(BATCH), start=1):
        loss = model(input_ids=tokens, labels=tokens).loss
        (loss / torch_loop.ACCUMULATE).backward()
        record.losses.append(loss.detach())
        if number % torch_loop.ACCUMULATE == 0:
            nn.utils.clip_grad_norm_(model.parameters(), torch_loop.MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
    return record


def start(tp_size: int, model: nn.Module | None = None, **switches: Any) -> tuple[Parallelized, Optimizer, Record]:
    model, record = tiny_llama(**LLAMA) if model is None else model, Record()
    run = parallelize(model, autotp_size=tp_size, device=rank_device(), **switches)
    optimizer = AdamW(run.module.parameters(), **EXACT)
    record.watch(run.module, optimizer)
    return run, optimizer, record


def train(run: Parallelized, optimizer: Optimizer, record: Record, data: Tensor) -> None:
    losses = torch.stack(torch_loop.train(run, optimizer, data, BATCH // run.mesh.dp_size))
    dist.all_reduce(losses, group=run.mesh.dp_group)
    record.losses.extend(losses / run.mesh.dp_size)


def assert_same(run: Parallelized, got: Record, want: Record, first: int = 0) -> None:
    """``got``'s steps are those of ``want`` from step ``first`` on, for this rank's part."""
    steps = len(got.gradients)
    losses = want.losses[first * torch_loop.ACCUMULATE :][: steps * torch_loop.ACCUMULATE]
    assert_close({"loss": torch.stack(got.losses)}, {"loss": torch.stack(losses)}, 1e-5, "loss")
    for at in range(steps):
        gradients, weights = want.gradients[first + at], want.weights[first + at]
        assert_close(got.gradients[at], part_of(run.module, gradients), 1e-4, f"gradient of step {at}")
        assert_close(got.weights[at], part_of(run.module, weights), 1e-4, f"weight of step {at}")


@pytest.mark.ranks(4, timeout=120)
def test_the_loop_is_the_unsharded_run_at_tp2_dp2_and_after_resuming_at_other_sizes(tmp_path: Path) -> None:
    """A replica reads 3 rows at a time, which 2 ranks do not divide."""
    want = unsharded(2 * STEPS)
    before, after = rows(2 * STEPS).chunk(2)
    run, optimizer, record = start(2)
    assert (run.sampler_kwargs["num_replicas"], run.mesh.dp_size) == (2, 2)
    train(run, optimizer, record, before)
    assert_same(run, record, want)
    assert len(record.gradients) == STEPS
    dcp.save(run.state_dict(optimizer), checkpoint_id=tmp_path)
    for tp_size in (2, 4):
        resumed, optimizer, record = start(tp_size, tiny_llama(seed=1, **LLAMA))
        resumed.load_state_dict(tmp_path, optimizer)
        train(resumed, optimizer, record, after)
        assert_same(resumed, record, want, first=STEPS)


@pytest.mark.ranks(4, timeout=120)
def test_the_loop_is_the_unsharded_run_at_tp2_cp2() -> None:
    """Ranks that split the tokens of a batch see the same data; the loop's first call is proved."""
    run, optimizer, record = start(2, context_parallel_size=2, proof="require")
    assert (run.sampler_kwargs["num_replicas"], run.mesh.cp_size) == (1, 2)
    train(run, optimizer, record, rows(2))
    assert run.engine.prover is not None and run.engine.prover.trained == 1
    assert_same(run, record, unsharded(2))


@pytest.mark.ranks(4)
def test_a_context_parallel_size_that_does_not_fit_is_refused_on_all_ranks() -> None:
    with pytest.raises(ValueError, match=r"context_parallel_size: 4 ranks x autotp_size 2 do not .* use one of 1, 2"):
        start(2, context_parallel_size=4)
    first, _, _ = start(2, context_parallel_size=2)
    with pytest.raises(ValueError, match=r"^mesh: its context parallel size is 2, and context_parallel_size is 1"):
        start(2, mesh=first.mesh)


SWITCHES: dict[str, dict[str, Any]] = {
    "none": {},
    "sequence": {"sequence_parallel": True},
    "loss": {"loss_parallel": True},
    "fused": {"loss_parallel": "fused"},
    "overlap": {"tp_overlap_comm": True},
    "saved": {"shard_saved_activations": True},
    "unchecked": {"check_agreement": False},
    "compile": {"compile": True},
    "all": {"sequence_parallel": True, "loss_parallel": "fused", "tp_overlap_comm": True},
}


@pytest.mark.parametrize("case", SWITCHES)
@pytest.mark.ranks(2, timeout=240)
def test_every_switch_works_as_through_the_strategy(case: str) -> None:
    torch._dynamo.reset()
    switches, model = SWITCHES[case], tiny_llama(**LLAMA).train()
    if case == "saved":
        model.gradient_checkpointing_enable()
    run, optimizer, record = start(2, model, **switches)
    train(run, optimizer, record, rows(2))
    assert_same(run, record, unsharded(2))
    head: Any = model.lm_head
    assert (head.keeps_part, head.defers) == ("loss_parallel" in switches, switches.get("loss_parallel") == "fused")
    assert (run.plan.sequence is not None) == switches.get("sequence_parallel", False)
    assert run.engine.sharded.overlap.on == switches.get("tp_overlap_comm", False)
    assert run.engine.look.enabled == switches.get("check_agreement", True)
    assert [layer._compiled_call_impl is not None for layer in model.model.layers] == [case == "compile"] * 2
    saved = run.engine.sharded.saved
    assert (saved is not None and saved._used) == (case == "saved")


def first_loss(run: Parallelized, tokens: Tensor) -> Tensor:
    loss: Tensor = run.model(input_ids=tokens, labels=tokens).loss
    return loss


@pytest.mark.ranks(4)
def test_the_norm_is_that_of_the_unsharded_gradient_and_step_returns_it() -> None:
    model: Any = tiny_llama(**LLAMA)
    tokens = rows(1)[:BATCH]
    model.to(rank_device())
    model(input_ids=tokens, labels=tokens).loss.backward()
    want = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    run, optimizer, _ = start(4)
    first_loss(run, tokens).backward()
    assert_close({"norm": run.grad_norm()}, {"norm": want}, 1e-5, "norm")
    returned = run.step(optimizer, max_norm=0.1)
    assert returned is not None
    assert_close({"norm": returned}, {"norm": want}, 1e-5, "norm")
    assert_close({"norm": run.grad_norm()}, {"norm": torch.full_like(want, 0.1)}, 1e-4, "clipped norm")
    assert run.step(optimizer) is None


@pytest.mark.ranks(4)
def test_ranks_that_share_a_model_draw_the_same_numbers_and_read_the_same_data() -> None:
    torch.manual_seed(dist.get_rank())
    run, _, _ = start(2)
    drawn: list[Any] = [None] * 4
    dist.all_gather_object(drawn, (float(torch.rand(())), run.sampler_kwargs))
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3]
    assert drawn[0][1] == {"num_replicas": 2, "rank": 0} and drawn[2][1] == {"num_replicas": 2, "rank": 1}


@pytest.mark.ranks(2)
def test_a_dtype_is_applied_where_it_is_set() -> None:
    run, _, _ = start(2, dtype="bfloat16")
    assert {p.dtype for p in run.module.parameters()} == {torch.bfloat16}


@pytest.mark.ranks(2)
def test_the_groups_of_another_model_may_be_used() -> None:
    first, _, _ = start(2)
    second, _, _ = start(2, mesh=first.mesh)
    assert second.mesh is first.mesh
    with pytest.raises(ValueError, match=r"^mesh: its tensor parallel size is 2, and autotp_size is 1"):
        start(1, mesh=first.mesh)


# -- checkpoints of and for unsharded runs --------------------------------------------------------------------------


def _save(path: str) -> dict[str, Tensor]:
    run, optimizer, record = start(2)
    train(run, optimizer, record, rows(1))
    dcp.save(run.state_dict(optimizer), checkpoint_id=path)
    return unsharded(1).weights[0]


def test_torch_reads_a_checkpoint_into_an_unsharded_model(tmp_path: Path) -> None:
    weights = run_ranks(2, _save, str(tmp_path))[0]
    model = tiny_llama(seed=1, **LLAMA)
    optimizer = AdamW(model.parameters(), **EXACT)
    state: dict[str, Any] = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert_close({name: state["model"][name] for name in weights}, weights, 1e-4, "weight")
    moments = state["optimizer"]["state"]
    assert moments.keys() == weights.keys()
    for name, tensor in weights.items():
        assert moments[name]["exp_avg"].shape == tensor.shape and moments[name]["exp_avg"].abs().sum() > 0
    assert state["optimizer"]["param_groups"][0]["lr"] == EXACT["lr"]


@pytest.mark.ranks(2)
def test_a_checkpoint_of_torch_and_a_full_state_are_read_into_a_sharded_model(tmp_path: Path) -> None:
    model: Any = tiny_llama(seed=1, **LLAMA)
    model.to(rank_device())
    optimizer = AdamW(model.parameters(), **EXACT)
    tokens = rows(1)[:BATCH]
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=tmp_path)
    want = {name: p.detach() for name, p in model.named_parameters()}
    for source in (tmp_path, state):
        run, ours, _ = start(2)
        run.load_state_dict(source, ours)
        mine = part_of(run.module, want)
        assert all(torch.equal(p, mine[name]) for name, p in run.module.named_parameters())
        moments = part_of(run.module, {n: optimizer.state[p]["exp_avg"] for n, p in model.named_parameters()})
        assert all(torch.equal(ours.state[p]["exp_avg"], moments[n]) for n, p in run.module.named_parameters())
        assert all(int(of_one["step"]) == 1 for of_one in ours.state.values())


@pytest.mark.ranks(2)
def test_a_state_is_read_in_place_as_dcp_does_it(tmp_path: Path) -> None:
    run, optimizer, record = start(2)
    train(run, optimizer, record, rows(1))
    dcp.save(run.state_dict(optimizer), checkpoint_id=tmp_path)
    train(run, optimizer, record, rows(1))
    state = run.state_dict(optimizer)
    dcp.load(state, checkpoint_id=tmp_path)
    run.load_state_dict(state, optimizer)
    assert all(torch.equal(p, record.weights[0][name]) for name, p in run.module.named_parameters())
    assert all(int(of_one["step"]) == 1 for of_one in optimizer.state.values())


@pytest.mark.ranks(2)
def test_wrong_checkpoints_are_refused(tmp_path: Path) -> None:
    run, optimizer, _ = start(2)
    dcp.save(run.state_dict(), checkpoint_id=tmp_path / "model")
    dcp.save({"other": torch.ones(1)}, checkpoint_id=tmp_path / "other")
    run.load_state_dict(tmp_path / "model")
    with pytest.raises(ValueError, match=r"has no optimizer in it"):
        run.load_state_dict(tmp_path / "model", optimizer)
    with pytest.raises(ValueError, match=r"is not a checkpoint of a run's state"):
        run.load_state_dict(tmp_path / "other")


# -- errors ---------------------------------------------------------------------------------------------------------


def test_without_processes_there_is_one_clear_error() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialized.*torchrun.*init_process_group"):
        parallelize(tiny_llama(), autotp_size=2)


@pytest.mark.ranks(2)
def test_what_is_wrong_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^autotp_size: 3 does not divide the 2 processes"):
        start(3)
    with pytest.raises(ValueError, match=r"unknown field 'autotp_sizes'.*autotp_size"):
        parallelize(tiny_llama(), autotp_sizes=2)
    run, _, _ = start(2)
    with pytest.raises(ValueError, match=r"^parallelize: this model is sharded already"):
        parallelize(run.module, autotp_size=2)
    with pytest.raises(ValueError, match=r"^LBFGS evaluates the loss within its step"):
        run.step(torch.optim.LBFGS(run.module.parameters()))
    with pytest.raises(ValueError, match=r"holds a parameter of shape \[3\]"):
        run.step(torch.optim.SGD([nn.Parameter(torch.ones(3))]))


@pytest.mark.ranks(2)
def test_ranks_that_read_other_data_or_come_to_other_losses_are_told() -> None:
    run, optimizer, _ = start(2)
    with pytest.raises(DisagreementError, match=r"disagree on batch.*must be fed the same data"):
        first_loss(run, rows(1)[dist.get_rank() :][:2])
    run, optimizer, _ = start(2)
    loss = first_loss(run, rows(1)[:2])
    loss.backward()
    with pytest.raises(DisagreementError, match=r"disagree on the loss"):
        run.step(optimizer, loss=loss + dist.get_rank())


@pytest.mark.skipif(0 < torch.cuda.device_count() < 4, reason="the example takes a GPU a process where there are any")
def test_the_example_runs_under_torchrun_and_resumes(tmp_path: Path) -> None:
    first, second = (str(tmp_path / name) for name in ("first", "second"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4", "-m"]
    done = subprocess.run([*torchrun, torch_loop.__name__, first], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("steps 1 to 5: loss")
    run_ranks(4, torch_loop.main, second, first, pg="none")
    for folder, step in ((first, STEPS), (second, 2 * STEPS)):
        found = {"step": 0}
        dcp.load(found, checkpoint_id=folder, no_dist=True)
        assert found == {"step": step}
