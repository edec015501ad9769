"""Kinds of collectives: lockstep gives what processes give, silent ones the same shapes, recording ones count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_autotp.config.training_config import TPConfig
from lightning_autotp.distributed.collectives import Collectives, Over
from lightning_autotp.distributed.lockstep import Lockstep
from lightning_autotp.distributed.mesh import Mesh, build_mesh
from lightning_autotp.distributed.recording import Collective, recording_mesh
from lightning_autotp.distributed.silent import SilentCollectives, silent_mesh

OVERS: list[Any] = ["tp", "dp", "world", (0, 1)]

CALLS: dict[str, Callable[[Collectives, Tensor, Any], Any]] = {
    "all_reduce": lambda c, x, over: c.all_reduce(x, over),
    "all_reduce_max": lambda c, x, over: c.all_reduce(x, over, op="max"),
    "start_all_reduce": lambda c, x, over: c.start_all_reduce(x, over)(),
    "all_gather": lambda c, x, over: c.all_gather(x, over),
    "reduce_scatter": lambda c, x, over: c.reduce_scatter(x, over),
    "start_reduce_scatter": lambda c, x, over: c.start_reduce_scatter(x, over)(),
    "broadcast": lambda c, x, over: c.broadcast(x, over),
}


def everything(mesh: Mesh) -> dict[str, Any]:
    """What a rank gets of every call, over every set of ranks; fp64 and integers, so that sums are exact."""
    collectives = mesh.collectives
    collectives.add_groups({(0, 1)})
    found: dict[str, Any] = {}
    for over in OVERS:
        for dtype in (torch.float64, torch.int64):
            for name, call in CALLS.items():
                x = torch.arange(24, dtype=dtype).view(8, 3) + 100 * collectives.world_rank
                result = call(collectives, x, over)
                found[f"{name} {over} {dtype}"] = result.tolist()
                if "reduce_scatter" not in name and "gather" not in name:
                    assert result is x or torch.equal(result, x), "contiguous tensors are overwritten"
        found[f"objects {over}"] = collectives.gather_objects({"rank": collectives.world_rank}, over)
        found[f"first {over}"] = collectives.broadcast_object(collectives.world_rank, over)
        found[f"size {over}"] = collectives.size(over)
    found["place"] = mesh.tp_rank, mesh.tp_size, mesh.dp_rank, mesh.dp_size, collectives.world_rank
    return found


@pytest.mark.ranks(4)
def test_lockstep_gives_what_processes_give() -> None:
    live = build_mesh(2, TPConfig())
    got = everything(live)
    in_one_process = Lockstep[dict[str, Any]](2, 2).run(everything)
    assert got == in_one_process[live.collectives.world_rank]
    assert got["all_reduce world torch.int64"][0][0] == 600 and got["first dp"] == live.tp_rank


@pytest.mark.parametrize("place", [(3, 1, 2, 0), (4, 3, 1, 0), (2, 0, 3, 2)])
def test_silent_results_have_the_shapes_and_dtypes_of_real_ones(place: tuple[int, int, int, int]) -> None:
    tp_size, tp_rank, dp_size, dp_rank = place

    def shapes(mesh: Mesh) -> dict[str, Any]:
        found = {}
        for over in ("tp", "dp", "world"):
            for name, call in CALLS.items():
                x = torch.zeros(2 * mesh.tp_size * mesh.dp_size, 3, dtype=torch.bfloat16)
                result = call(mesh.collectives, x, over)
                found[f"{name} {over}"] = tuple(result.shape), result.dtype, result.is_contiguous()
            found[f"objects {over}"] = len(mesh.collectives.gather_objects(None, over))  # type: ignore[assignment]
        return found

    mesh = silent_mesh(tp_size, tp_rank, dp_size, dp_rank)
    want = Lockstep[dict[str, Any]](tp_size, dp_size).run(shapes)
    assert shapes(mesh) == want[mesh.collectives.world_rank]


@pytest.mark.parametrize("place", [(2, 2), (2, -1), (2, 0, 2, 2)])
def test_a_silent_rank_that_cannot_be_is_an_error(place: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="there is no rank"):
        silent_mesh(*place)


def test_no_group_can_be_had_of_ranks_that_are_no_processes() -> None:
    with pytest.raises(RuntimeError, match="SilentCollectives joins ranks that are no processes"):
        _ = silent_mesh(2).tp_group


def test_recording_counts_calls_and_the_bytes_of_full_tensors() -> None:
    mesh, recorder = recording_mesh(silent_mesh(4, 1, dp_size=2))
    x, weight = torch.zeros(8, 6), torch.zeros(5, 6)
    for over in ("tp", "dp", (0, 3)):
        for call in CALLS.values():
            call(mesh.collectives, x, over)
    mesh.collectives.all_gather_matmul(x, [weight, weight])
    mesh.collectives.matmul_reduce_scatter(x, weight)
    mesh.collectives.gather_objects(x)
    full = 8 * 6 * 4
    sizes: list[tuple[Over, int]] = [("tp", 4), ("dp", 2), ((0, 3), 2)]
    want = {Collective("all-reduce", 4, full): 3, Collective("all-reduce", 2, full): 6}
    want |= {Collective("all-gather", 4, 4 * full): 2, Collective("all-gather", 2, 2 * full): 2}
    want |= {Collective("reduce-scatter", 4, full): 2, Collective("reduce-scatter", 2, full): 4}
    want |= {Collective("reduce-scatter", 4, 8 * 5 * 4): 1}
    want |= {Collective("broadcast", 4, full): 1, Collective("broadcast", 2, full): 2}
    assert recorder.counts == want
    assert recorder.number("all-reduce") == 9 and recorder.bytes("broadcast") == 3 * full
    assert all(mesh.collectives.size(over) == size for over, size in sizes)


@pytest.mark.ranks(2)
def test_recorded_processes_send_what_others_do() -> None:
    plain = build_mesh(2, TPConfig())
    mesh, recorder = recording_mesh(plain)
    x = torch.full((2, 2), float(mesh.tp_rank))
    assert mesh.collectives.all_reduce(x).tolist() == [[1.0, 1.0]] * 2
    assert recorder.counts == {Collective("all-reduce", 2, 16): 1}
    assert mesh.tp_group is plain.tp_group and mesh.tp_source == 0


def test_every_call_of_the_door_is_recorded_or_handed_on() -> None:
    from lightning_autotp.distributed.recording import RecordingCollectives

    public = {name for name, value in vars(Collectives).items() if callable(value) and not name.startswith("_")}
    assert public <= set(vars(RecordingCollectives)), (
        "a call that is not there would be done by the base class, uncounted"
    )
    assert set(vars(SilentCollectives)) >= Collectives.__abstractmethods__
