"""From a sharded run to ``from_pretrained``: the command on a checkpoint alone, and the call in the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lightning_autotp
from lightning_autotp import AutoTPStrategy
from lightning_autotp.checkpoint.hf_export import write_model
from lightning_autotp.checkpoint.hf_record import models_in, record_of
from lightning_autotp.checkpoint.hf_twin import twin_of
from lightning_autotp.checkpoint.safetensors_files import SafetensorsFiles
from lightning_autotp.checkpoint.tensors import open_checkpoint, tensors_of
from lightning_autotp.cli.export import main as export
from lightning_autotp.cli.inspect import main as inspect
from lightning_autotp.model_sources.small import small_config, small_model
from tests.helpers.checkpoints import Scheduled, fit, trained
from tests.helpers.models import LanguageModel, quiet_trainer, token_batches, token_loader
from tests.helpers.rank_pool import run_ranks
from tests.helpers.small_nets import alone, full_weights, strategy, trainer, weights

TOKENS = token_batches(seed=3, n=1, batch=2, seq=8, vocab=100)[0]
PLAIN = ["llama", "llama-tied", "mixtral", "gpt2", "bloom", "deepseek_v2"]
FIXTURES = Path(__file__).parent / "fixtures"


def made(case: str) -> nn.Module:
    """The model of a case; LoRA's has adapters that are not zero, and a head of its own."""
    kind, _, more = case.partition("-")
    model: Any = small_model(small_config(kind), tied=more == "tied" if kind == "llama" else None)
    if more != "lora":
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"], modules_to_save=["lm_head"])
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted


def run(case: str, folder: Path, directory: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """Train two steps, save and write in every way; what the model then says, and its full weights."""
    model = LanguageModel(made, case=case)
    plugin = AutoTPStrategy(autotp_size=2, save_distributed_checkpoint=directory)
    running = quiet_trainer(strategy=plugin, use_distributed_sampler=False, limit_train_batches=2)
    running.fit(model, token_loader(vocab=100))
    running.save_checkpoint(folder / "checkpoint")
    inner: Any = model.model
    for saver in (inner, getattr(inner, "base_model", inner)):
        with pytest.raises(RuntimeError, match=r"would write this rank's shard.*lightning_autotp\.save_pretrained"):
            saver.save_pretrained(folder / "wrong")
    assert inner.num_parameters() == made(case).num_parameters()  # type: ignore[operator]
    lightning_autotp.save_pretrained(model, folder / "live")
    lightning_autotp.save_pretrained(inner, folder / "live-merged", merge=True, max_shard_size=60_000)
    model.eval()
    with torch.no_grad():
        said = model(TOKENS)
    return said, full_weights(model)


def read(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def files_in(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("case", PLAIN)
def test_a_trained_model_comes_back_from_its_checkpoint_alone(case: str, tmp_path: Path) -> None:
    said, full = run_ranks(2, run, case, tmp_path)[0]
    shutil.copytree(tmp_path / "checkpoint", tmp_path / "moved" / "checkpoint")
    (tmp_path / "moved" / "tokenizer.json").write_text("{}")
    assert export([str(tmp_path / "moved" / "checkpoint"), str(tmp_path / "out"), "--max-shard-size", "60kB"]) == 0
    model = read(tmp_path / "out")
    got = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    assert got.keys() == full.keys() and all(torch.equal(got[name], full[name]) for name in full)
    with torch.no_grad():
        assert torch.allclose(model(TOKENS).logits, said, atol=1e-5)
    # as transformers itself would have written them
    model.save_pretrained(tmp_path / "theirs")
    theirs, ours = files_in(tmp_path / "theirs"), files_in(tmp_path / "out")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == ours.keys() and len(set(index["weight_map"].values())) > 1
    assert (tmp_path / "out" / "tokenizer.json").exists()
    want = json.loads((tmp_path / "theirs" / "config.json").read_text())
    have = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {k: v for k, v in have.items() if k != "transformers_version"} == {
        k: v for k, v in want.items() if k != "transformers_version"
    }
    for live in ("live", "live-merged"):
        from_run = files_in(tmp_path / live)
        assert from_run.keys() == theirs.keys() and all(torch.equal(from_run[n], theirs[n]) for n in theirs)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("directory", [True, False], ids=["directory", "file"])
def test_adapters_come_back_alone_or_merged(directory: bool, tmp_path: Path) -> None:
    from peft import PeftModel

    said, _ = run_ranks(2, run, "qwen3-lora", tmp_path, directory)[0]
    checkpoint = str(tmp_path / "checkpoint")
    assert export([checkpoint, str(tmp_path / "adapter")]) == 0
    assert export([checkpoint, str(tmp_path / "merged"), "--merge"]) == 0
    for folder in ("adapter", "live"):
        base: Any = small_model(small_config("qwen3"))
        adapted = PeftModel.from_pretrained(base, str(tmp_path / folder)).eval()
        with torch.no_grad():
            assert torch.allclose(adapted(TOKENS).logits, said, atol=1e-5), folder
    for folder in ("merged", "live-merged"):
        with torch.no_grad():
            assert torch.allclose(read(tmp_path / folder)(TOKENS).logits, said, atol=1e-5), folder
    made("qwen3-lora").save_pretrained(tmp_path / "theirs")  # type: ignore[operator]
    theirs, ours = files_in(tmp_path / "theirs"), files_in(tmp_path / "adapter")
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}


def test_a_record_neither_fetches_code_nor_writes_outside_of_the_directory(tmp_path: Path) -> None:
    model: Any = made("qwen3-lora")
    tensors = tensors_of(model, None)
    record: Any = record_of("", model)
    record["config"]["attn_implementation"] = record["config"]["_attn_implementation"] = "some/kernel"
    record["config"]["quantization_config"] = {"quant_method": "fp8"}
    record["config"]["auto_map"] = {"AutoModelForCausalLM": "some/repository--modeling.Model"}
    twin: Any = twin_of(record)
    assert twin.config._attn_implementation == "eager" and twin.device.type == "meta"
    assert (
        twin_of({**record, "known_class": "PreTrainedModel"}) is twin_of({**record, "known_class": "Trainer"}) is None
    )
    record["adapters"] = {"../outside": record["adapters"]["default"]}
    with pytest.raises(ValueError, match=r"'\.\./outside' is no name of an adapter"):
        write_model(record, tensors, tmp_path / "in" / "out")
    assert list((tmp_path / "in").iterdir()) == [] and [entry.name for entry in tmp_path.iterdir()] == ["in"]


def test_a_model_that_cannot_be_described_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = made("llama")
    monkeypatch.setattr(type(model.config), "to_diff_dict", lambda self: vars(self)["key"])
    with pytest.warns(UserWarning, match=r"config of LlamaForCausalLM cannot be recorded \(KeyError"):
        assert models_in(model) == []


def out_of_space(folder: Path) -> None:
    running = quiet_trainer(strategy=AutoTPStrategy(autotp_size=2), max_epochs=0)
    running.fit(model := LanguageModel(made, case="llama"), token_loader(vocab=100))
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:
            patch.setattr(SafetensorsFiles, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises((OSError, RuntimeError), match="No space left"):
            lightning_autotp.save_pretrained(model, folder / "out")
    assert list(folder.iterdir()) == []


def test_a_full_disk_ends_the_call_on_all_ranks_and_leaves_nothing(tmp_path: Path) -> None:
    run_ranks(2, out_of_space, tmp_path)
    assert list(tmp_path.iterdir()) == []


class Two(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = made("llama"), made("gpt2")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.student(batch, labels=batch).loss + self.teacher(batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def two(folder: Path) -> None:
    running = quiet_trainer(strategy=AutoTPStrategy(autotp_size=2), max_epochs=0)
    running.fit(model := Two(), token_loader(vocab=100))
    running.save_checkpoint(folder / "checkpoint")
    with pytest.raises(ValueError, match=r"several Hugging Face models, at 'student', 'teacher'; choose one"):
        lightning_autotp.save_pretrained(model, folder / "out")
    lightning_autotp.save_pretrained(model, folder / "student", submodule="student")


def test_of_several_models_one_is_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_ranks(2, two, tmp_path)
    checkpoint, out = str(tmp_path / "checkpoint"), str(tmp_path / "teacher")
    assert export([checkpoint, out]) == 1
    assert "choose one (`--submodule`)" in capsys.readouterr().err
    assert export([checkpoint, out, "--submodule", "third"]) == 1
    assert "no Hugging Face model at 'third'" in capsys.readouterr().err
    assert export([checkpoint, out, "--submodule", "teacher"]) == 0
    for name, want in (("teacher", made("gpt2")), ("student", made("llama"))):
        got, expected = read(tmp_path / name).state_dict(), want.state_dict()
        assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_a_checkpoint_that_says_nothing_of_its_model_takes_a_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = made("llama")
    model.save_pretrained(tmp_path / "theirs")
    torch.save({"state_dict": {f"net.{n}": t for n, t in model.state_dict().items()}}, tmp_path / "old.ckpt")
    arguments = [str(tmp_path / "old.ckpt"), str(tmp_path / "out")]
    assert export(arguments) == 1
    assert "says nothing of a Hugging Face model" in capsys.readouterr().err
    assert export([*arguments, "--config", str(tmp_path / "theirs"), "--submodule", "wrong"]) == 1
    assert "lacks" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert export([*arguments, "--config", str(tmp_path / "theirs"), "--submodule", "net"]) == 0
    theirs, ours = files_in(tmp_path / "theirs"), files_in(tmp_path / "out")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def plain_resume(path: Path, epochs: int) -> dict[str, Tensor]:
    model = Scheduled()
    with alone():
        fit(trainer("auto", devices=1, max_epochs=epochs), model, path, None)
    return weights(model)


def ours_resumed(path: Path) -> dict[str, Tensor]:
    model = Scheduled()
    trainer(strategy(2), max_epochs=2).fit(model, ckpt_path=path)
    return full_weights(model)


def test_one_file_resumes_in_a_plain_trainer_with_the_optimizer(tmp_path: Path) -> None:
    run_ranks(2, trained, 2, 1, None, tmp_path / "directory")
    assert export([str(tmp_path / "directory"), str(tmp_path / "one.ckpt"), "--format", "ckpt"]) == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["directory", "one.ckpt"]
    run_ranks(2, trained, 2, 1, None, tmp_path / "file", False)
    ours, want = (torch.load(tmp_path / name, weights_only=True) for name in ("one.ckpt", "file"))
    assert ours.keys() == want.keys() and ours["lr_schedulers"] == want["lr_schedulers"]
    assert all(torch.equal(ours["state_dict"][name], want["state_dict"][name]) for name in want["state_dict"])
    got = run_ranks(1, plain_resume, tmp_path / "one.ckpt", 2)[0]
    resumed = run_ranks(2, ours_resumed, tmp_path / "directory")[0]
    assert all(torch.allclose(got[name], resumed[name], atol=1e-6) for name in got)


def test_a_checkpoint_of_the_first_version_becomes_a_file(tmp_path: Path) -> None:
    assert export([str(FIXTURES / "directory-0.1.0"), str(tmp_path / "one.ckpt"), "--format", "ckpt"]) == 0
    got, want = (torch.load(p, weights_only=True) for p in (tmp_path / "one.ckpt", FIXTURES / "file-0.1.0.pt"))
    assert all(torch.equal(got["state_dict"][name], want["state_dict"][name]) for name in want["state_dict"])
    ours, theirs = (found["optimizer_states"][0]["state"] for found in (got, want))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n][e], theirs[n][e]) for n in theirs for e in theirs[n])


def test_inspect_tells_what_is_there_and_whether_it_is_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(2, trained, 2, 1, None, tmp_path / "checkpoint")
    capsys.readouterr()  # what the ranks wrote
    assert inspect([str(tmp_path / "checkpoint"), "--json", "--checksums"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["written_by"]["autotp_size"] == 2 and said["complete"] and said["global_step"] == 4
    assert said["tensors"]["state_dict.net.up.weight"] == {"dtype": "float32", "shape": [10, 8], "bytes": 320}
    assert inspect([str(tmp_path / "checkpoint")]) == 0
    assert "complete: all files are there" in capsys.readouterr().out
    (tmp_path / "checkpoint" / "__1_0.distcp").unlink()
    assert inspect([str(tmp_path / "checkpoint")]) == 1
    assert "lacks `__1_0.distcp`" in capsys.readouterr().err
    assert inspect([str(FIXTURES / "directory-0.1.0"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["written_by"] == {}


# ---- files


def test_safetensors_are_those_of_the_library_whatever_the_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.tensor(True),
        "c": torch.randn(2, 2).double(),
        "d": torch.empty(0, 4),
        "e": torch.arange(7, dtype=torch.uint8),
        "f": torch.randn(4, 4).half().t(),
    }
    files = SafetensorsFiles(tmp_path, {n: t.to("meta") for n, t in tensors.items()}, 40)
    with pytest.raises(ValueError, match="these tensors were not written"):
        files.finish()
    with pytest.raises(ValueError, match=r"float32 \[3, 5\], and torch\.bfloat16"):
        files.write("a", torch.zeros(3, 5))
    for name in reversed(tensors):
        files.write(name, tensors[name])
    files.finish()
    assert files.sharded
    got = files_in(tmp_path)
    assert got.keys() == tensors.keys() and all(torch.equal(got[name], tensors[name]) for name in tensors)
    save_file({name: got[name] for name in "ac"}, tmp_path / "theirs.safetensors")
    assert load_file(tmp_path / "theirs.safetensors")["a"].dtype == torch.bfloat16


def test_an_opened_checkpoint_reads_only_what_is_asked_for() -> None:
    found = open_checkpoint(FIXTURES / "directory-0.1.0")
    want = torch.load(FIXTURES / "file-0.1.0.pt", weights_only=True)["state_dict"]
    assert found.model.shapes.keys() == want.keys()
    assert all(torch.equal(found.model.read(name), want[name]) for name in want)
    assert all(shape.is_meta for shape in found.tensors.shapes.values())
