"""Checkpoints that DeepSpeed itself wrote (fixtures/deepspeed/make.py says how), merged, imported and resumed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_autotp.checkpoint.foreign.doors import open_any
from lightning_autotp.checkpoint.places import place_of
from lightning_autotp.checkpoint.tensors import Checkpoint, open_checkpoint
from lightning_autotp.cli.export import main as export
from lightning_autotp.cli.import_checkpoint import main as import_
from lightning_autotp.cli.inspect import main as inspect
from tests.checkpoint.fixtures.deepspeed.nets import LLAMA, RULES, Fused, groups
from tests.helpers.closeness import assert_close
from tests.helpers.rank_pool import RankFailure, run_ranks
from tests.helpers.small_nets import full_weights, strategy, trainer

FIXTURES = Path(__file__).parent / "fixtures" / "deepspeed"
OF_ZERO = ["fused-zero", "zero2", "zero3", "fused-zero-universal", "zero3-universal"]


def truth(kind: str) -> dict[str, dict[str, Tensor]]:
    """What the unsharded model computed in plain torch."""
    found: dict[str, dict[str, Tensor]] = torch.load(FIXTURES / f"truth-{kind}.pt", weights_only=True)
    return found


def assert_weights(found: Checkpoint, kind: str) -> None:
    want = truth(kind)["weights"]
    assert found.model.shapes.keys() == want.keys()
    # verify's bound: DeepSpeed's sums round in another order, and AdamW's first steps make more of that
    assert_close({name: found.model.read(name) for name in want}, want, 1e-4, "weight")


@pytest.mark.parametrize("case", ["autotp", *OF_ZERO])
def test_what_ranks_hold_becomes_what_one_would_hold(case: str) -> None:
    kind = "llama" if case == "autotp" else "fused"
    found = open_any(FIXTURES / case)
    assert_weights(found, kind)
    assert found.writer.startswith("DeepSpeed 0.19.")
    if case not in OF_ZERO:  # the optimizer's parameters have no names there
        assert "optimizer_states" not in found.rest and "the optimizer's state is left out" in found.notes[0]
        return
    (state,) = found.rest["optimizer_states"]
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.1, 0.0]
    for name in truth(kind)["weights"]:
        for entry in ("exp_avg", "exp_avg_sq"):
            got = found.tensors.read(f"optimizers.0.{name}.{entry}")
            assert_close({name: got}, {name: truth(kind)[entry][name]}, 1e-5, entry)
        assert found.tensors.read(f"optimizers.0.{name}.step") == 3


@pytest.mark.parametrize("case", ["zero3", "fused-zero-universal"])
def test_it_may_be_remote(case: str) -> None:
    fsspec.filesystem("memory").put(str(FIXTURES / case), f"/deepspeed/{case}", recursive=True)
    assert_weights(open_any(place_of(f"memory://deepspeed/{case}")), "fused")


class Continued(LightningModule):
    """Goes on where DeepSpeed stopped, with its names and its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Fused()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return functional.mse_loss(self.block(batch), batch.flip(-1))

    def train_dataloader(self) -> DataLoader[Tensor]:
        rows = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
        return DataLoader(list(rows), batch_size=4)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups(self), lr=0.01)


def resumed(path: Path, epochs: int) -> dict[str, Tensor]:
    model = Continued()
    trainer(strategy(2, partition_config=RULES), max_epochs=epochs).fit(model, ckpt_path=path)
    return full_weights(model)


def went_on() -> dict[str, Tensor]:
    """Two more steps in plain torch, from what was computed there."""
    model = Continued()
    model.load_state_dict(truth("fused")["weights"])
    optimizer = torch.optim.AdamW(groups(model), lr=0.01)
    for name, parameter in model.named_parameters():
        moments = {entry: truth("fused")[entry][name] for entry in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(3.0), **moments}
    for batch in model.train_dataloader():
        model.training_step(batch, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("case", OF_ZERO)
def test_training_goes_on_with_the_moments(case: str, tmp_path: Path) -> None:
    want = went_on()
    assert_close(run_ranks(2, resumed, FIXTURES / case, 1)[0], want, 1e-5, "as it is")
    assert import_([str(FIXTURES / case), str(tmp_path / "ours")]) == 0
    assert_close(run_ranks(2, resumed, tmp_path / "ours", 1)[0], want, 1e-5, "imported")
    found = open_checkpoint(tmp_path / "ours", all_bytes=True)
    assert found.manifest is not None and "of DeepSpeed 0.19.8" in found.manifest.written_by["imported_from"]


def test_inspect_says_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect([str(FIXTURES / "fused-zero-universal"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["written_by"] == {"by": "DeepSpeed 0.19.8 (universal, tp 2, dp 1)"} and said["global_step"] == 3
    assert said["tensors"]["state_dict.block.qkv.weight"]["shape"] == [32, 16]


def test_a_file_for_a_plain_trainer_and_weights_alone(tmp_path: Path) -> None:
    case = str(FIXTURES / "fused-zero-universal")
    assert import_([case, str(tmp_path / "one.ckpt"), "--format", "ckpt", "--submodule", "inner"]) == 0
    made = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert set(made["state_dict"]) == {f"inner.{name}" for name in truth("fused")["weights"]}
    assert made["optimizer_states"][0]["state"].keys() == set(range(9))
    assert import_([case, str(tmp_path / "weights"), "--weights-only"]) == 0
    found = open_checkpoint(tmp_path / "weights")
    assert found.rest["optimizer_states"] == [] and found.tensors.shapes.keys() == {
        f"state_dict.{name}" for name in truth("fused")["weights"]
    }


def test_an_autotp_llama_reaches_hugging_face(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    LlamaConfig(**LLAMA, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "config")
    config = ["--config", str(tmp_path / "config")]
    assert import_([str(FIXTURES / "autotp"), str(tmp_path / "ours"), *config]) == 0
    assert export([str(tmp_path / "ours"), str(tmp_path / "out")]) == 0
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    got = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    assert_close(got, truth("llama")["weights"], 1e-4, "weight")
    # a prefix may stand before it, and a config of another model is named
    assert import_([str(FIXTURES / "autotp"), str(tmp_path / "ours"), *config, "--submodule", "net"]) == 0
    assert open_checkpoint(tmp_path / "ours").models[0]["path"] == "net.model"
    assert import_([str(FIXTURES / "fused-zero"), str(tmp_path / "ours"), *config]) == 1


@pytest.mark.parametrize("version", ["0.18.7", "0.19.0"])
def test_what_nobody_recorded_is_merged_by_the_plan_or_refused(
    version: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, out = str(FIXTURES / f"fused-{version}"), str(tmp_path / "out")
    assert import_([old, out]) == 1
    error = capsys.readouterr().err
    assert "block.norm.weight cannot be merged: DeepSpeed did not record how it was cut; its ranks hold [16]" in error
    assert f"It was written by DeepSpeed {version}" in error and "lightning-autotp import --model CONFIG" in error
    with pytest.raises(RankFailure, match="lightning-autotp import --model CONFIG"):
        run_ranks(2, resumed, Path(old), 1)
    (tmp_path / "ds_config.json").write_text(json.dumps({"tensor_parallel": {"partition_config": RULES}}))
    model = ["--model", "tests.checkpoint.fixtures.deepspeed.nets:factory"]
    assert import_([old, out, *model, "--rules", str(tmp_path / "ds_config.json")]) == 0
    assert_weights(open_checkpoint(tmp_path / "out"), "fused")
    # a plan that cuts in another way than DeepSpeed did is found out by what ranks hold
    (tmp_path / "wrong.json").write_text(
        json.dumps({"layer_specs": [{**RULES["layer_specs"][0], "gather_output": True}]})
    )
    capsys.readouterr()
    assert import_([old, str(tmp_path / "no"), *model, "--rules", str(tmp_path / "wrong.json")]) == (
        version == "0.18.7"
    )
    if version == "0.18.7":  # the later one has recorded what it holds of row layers
        error = capsys.readouterr().err
        assert "block.out.weight cannot be merged: its ranks hold [16, 8], [16, 8], which is not what (16, 16)" in error
        assert not (tmp_path / "no").exists()


def test_replicas_that_differ_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "autotp"
    shutil.copytree(FIXTURES / "autotp", path)
    file = path / "global_step3" / "mp_rank_01_model_states.pt"
    held = torch.load(file, weights_only=True)
    held["module"]["model.model.norm.weight"] += 0.5
    torch.save(held, file)
    assert import_([str(path), str(tmp_path / "out")]) == 1
    assert "model.model.norm.weight cannot be merged: all ranks should hold it alike, and they differ by up to 0.5" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
    assert import_([str(path), str(tmp_path / "out"), "--take-first-replica"]) == 0
    assert_weights(open_checkpoint(tmp_path / "out"), "llama")


class Harm:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("harm-was-done",))


def test_hostile_and_broken_files_are_named_and_run_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    universal = FIXTURES / "fused-zero-universal"

    def refused(say: str, source: Path, *break_: tuple[str, Any]) -> None:
        shutil.rmtree("copy", ignore_errors=True)
        shutil.copytree(source, "copy")
        for name, content in break_:
            file = Path("copy") / name
            file.unlink()
            if content is not None:
                file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
        assert import_(["copy", "out"]) == 1
        error = capsys.readouterr().err
        assert say in error, error
        assert not Path("harm-was-done").exists() and not Path("out").exists()

    step = "global_step3"
    refused("holds posix.mkdir", universal, (f"{step}/zero/block.qkv.weight/fp32.pt", {"param": Harm()}))
    refused("holds posix.mkdir", universal, (f"{step}/mp_rank_01_model_states.pt", {"module": {}, "x": Harm()}))
    refused("holds posix.mkdir", FIXTURES / "zero3", (f"{step}/zero_pp_rank_1_mp_rank_00_optim_states.pt", Harm()))
    refused("which is no directory beside it", universal, ("latest_universal", b"../elsewhere"))
    refused("lacks the directory `global_step4`", universal, ("latest_universal", b"global_step4"))
    refused("of mp_rank 00", universal, (f"{step}/mp_rank_00_model_states.pt", None))
    refused("zero_pp_rank 0", FIXTURES / "zero2", (f"{step}/zero_pp_rank_0_mp_rank_00_optim_states.pt", None))
    refused("is truncated or damaged", universal, (f"{step}/zero/block.qkv.weight/exp_avg.pt", b"PK"))
    refused("is damaged, or of a DeepSpeed that is not known", universal, (f"{step}/zero/optimizer_state.pt", [1]))
    refused("holds posix.mkdir", universal, (f"{step}/zero/optimizer_state.pt", {"param_groups": Harm()}))
