"""Pretrained models of which each rank reads its part: the numbers of transformers' own from_pretrained, bit by bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_autotp import AutoTPStrategy, TPTrainingConfig, from_pretrained, make_plan
from lightning_autotp.distributed.lockstep import Lockstep
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.distributed.silent import silent_mesh
from lightning_autotp.model_sources.small import small_config, small_model
from lightning_autotp.sharding.shard import shard
from tests.helpers.models import next_token_loss, quiet_trainer, token_loader
from tests.helpers.small_nets import weights

CPU = torch.device("cpu")
TOKENS = torch.arange(10).view(2, 5)


def saved(folder: Path, model_type: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A small model as transformers writes it."""
    config = small_config(model_type)
    config.tie_word_embeddings = options.pop("tied", config.tie_word_embeddings)
    model: Any = small_model(config)
    model.to(dtype).save_pretrained(folder, **options)
    return folder


def sharded(model: nn.Module, mesh: Mesh) -> nn.Module:
    config = TPTrainingConfig(autotp_size=mesh.tp_size)
    shard(model, make_plan(model, config), mesh, config, device=CPU)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(TOKENS).logits
    return found


def check(load: Callable[[Callable[..., Any]], nn.Module], *, tokens: bool = True) -> None:
    """``load`` builds with the ``from_pretrained`` it is given: with ours, sharded, parts of transformers' model."""
    torch.manual_seed(3)
    want = load(lambda model_class, *args, **kwargs: model_class.from_pretrained(*args, **kwargs))
    full = dict(want.named_parameters(remove_duplicate=False))
    buffers = dict(want.named_buffers())

    def rank(mesh: Mesh) -> Tensor | None:
        torch.manual_seed(3)
        model = load(from_pretrained)
        layouts = make_plan(model, TPTrainingConfig(autotp_size=2)).layouts
        sharded(model, mesh)
        ours = dict(model.named_parameters(remove_duplicate=False))
        assert ours.keys() == full.keys()
        for name, parameter in ours.items():
            part = layouts[name].shard(full[name].detach(), mesh.tp_rank)
            assert parameter.dtype == part.dtype and parameter.requires_grad == full[name].requires_grad, name
            assert torch.equal(parameter, part), name
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, buffers[name]), name
        return logits(model) if tokens else None

    for found in Lockstep[Any](2).run(rank):
        if tokens:
            assert torch.allclose(found.float(), logits(want).float(), atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2", "bloom", "deepseek_v2", "qwen3", "gpt_oss"])
def test_a_rank_reads_its_part_of_each_family(model_type: str, tmp_path: Path) -> None:
    saved(tmp_path, model_type)
    check(lambda load: load(AutoModelForCausalLM, tmp_path))


@pytest.mark.parametrize(
    "options", [{"dtype": torch.float32}, {"dtype": "bfloat16", "attn_implementation": "eager"}], ids=["fp32", "bf16"]
)
def test_dtypes_are_converted_as_transformers_converts_them(options: dict[str, Any], tmp_path: Path) -> None:
    saved(tmp_path, "llama", torch.bfloat16 if options["dtype"] is torch.float32 else torch.float32)
    check(lambda load: load(AutoModelForCausalLM, tmp_path, **options), tokens=options["dtype"] is torch.float32)


def test_a_later_conversion_starts_from_the_rounded_values(tmp_path: Path) -> None:
    saved(tmp_path)
    check(lambda load: load(AutoModelForCausalLM, tmp_path, dtype=torch.bfloat16).to(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_buffers_that_are_in_the_files_are_read_whatever_is_done_to_the_model(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model: Any = small_model(small_config("glm4_moe"))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-1, 1, len(buffer)))
    model.save_pretrained(tmp_path)
    assert any(name.endswith("e_score_correction_bias") for name in load_file(tmp_path / "model.safetensors"))
    check(lambda load: load(AutoModelForCausalLM, tmp_path).to(dtype), tokens=False)


def test_tied_weights_over_several_files_stay_one_parameter(tmp_path: Path) -> None:
    saved(tmp_path, tied=True, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check(lambda load: load(AutoModelForCausalLM, tmp_path))
    model = sharded(from_pretrained(AutoModelForCausalLM, tmp_path), silent_mesh(2, 1))
    assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]


def test_what_is_missing_is_drawn_as_transformers_draws_it(tmp_path: Path) -> None:
    saved(tmp_path)

    def load(by: Callable[..., Any]) -> nn.Module:
        model, report = by(AutoModelForSequenceClassification, tmp_path, num_labels=3, output_loading_info=True)
        assert (report["missing_keys"], report["unexpected_keys"]) == ({"score.weight"}, {"lm_head.weight"})
        found: nn.Module = model
        return found

    check(load, tokens=False)


def test_torch_files_and_mismatched_sizes_are_reported_alike(tmp_path: Path) -> None:
    saved(tmp_path)
    state = load_file(tmp_path / "model.safetensors") | {"lm_head.weight": torch.zeros(5, 5)}
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    check(lambda load: load(AutoModelForCausalLM, tmp_path, ignore_mismatched_sizes=True))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        from_pretrained(AutoModelForCausalLM, tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_block_fp8_files_are_dequantized(model_type: str, tmp_path: Path) -> None:
    from transformers import FineGrainedFP8Config

    saved(tmp_path, model_type, torch.bfloat16)
    file, written = tmp_path / "model.safetensors", {}
    for name, tensor in load_file(file).items():
        if "proj" in name or "experts" in name:
            blocks = tensor.float().unflatten(1, (-1, 16)).unflatten(0, (-1, 16))
            scale = blocks.abs().amax((1, 3)) / 448
            written[f"{name}_scale_inv"] = scale
            tensor = (blocks / scale[:, None, :, None]).reshape(tensor.shape).to(torch.float8_e4m3fn)
        written[name] = tensor
    save_file(written, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options: dict[str, Any] = {"quantization_config": FineGrainedFP8Config(dequantize=True), "dtype": torch.float32}
    check(lambda load: load(AutoModelForCausalLM, tmp_path, **options))


def test_a_context_that_makes_everything_on_meta_changes_nothing(tmp_path: Path) -> None:
    saved(tmp_path)

    def load(by: Callable[..., Any]) -> nn.Module:
        with torch.device("meta" if by is from_pretrained else "cpu"):
            model: nn.Module = by(AutoModelForSequenceClassification, tmp_path, num_labels=3)
        return model

    check(load, tokens=False)


def test_a_copy_of_a_model_that_is_not_read_yet_is_read_too(tmp_path: Path) -> None:
    saved(tmp_path, tied=True)
    check(lambda load: copy.deepcopy(load(AutoModelForCausalLM, tmp_path)))


# -- without shards, and what is refused -------------------------------------------------------------------------------


class Pretrained(LightningModule):
    def __init__(self, folder: Path, load: Callable[..., Any]) -> None:
        super().__init__()
        self.folder, self.load = folder, load

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            self.model = self.load(AutoModelForCausalLM, self.folder)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return next_token_loss(self.model(batch).logits, batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", next_token_loss(self.model(batch).logits, batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, eps=1e-5)


def ordinary(model_class: Any, folder: Path) -> Any:
    return model_class.from_pretrained(folder)


def fitted(folder: Path, load: Callable[..., Any], **trainer: Any) -> Pretrained:
    model = Pretrained(folder, load)
    quiet_trainer(**trainer).fit(model, token_loader())
    return model


def test_a_plain_trainer_reads_the_full_model_and_trains_it(tmp_path: Path) -> None:
    saved(tmp_path, tied=True)
    ours, theirs = (fitted(tmp_path, load, strategy="auto", devices=1) for load in (from_pretrained, ordinary))
    assert weights(ours).keys() == weights(theirs).keys()
    assert all(torch.equal(tensor, weights(theirs)[name]) for name, tensor in weights(ours).items())
    assert ours.model.lm_head.weight is ours.model.model.embed_tokens.weight
    ours.model.resize_token_embeddings(140)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.ranks(2)
def test_a_fit_with_shards_that_were_read_is_a_fit_with_shards_that_were_cut(size: int, tmp_path: Any) -> None:
    folder = tmp_path / "model"
    if dist.get_rank() == 0:
        saved(folder, "mixtral")
    dist.barrier()
    both = [fitted(folder, load, strategy=AutoTPStrategy(autotp_size=size)) for load in (from_pretrained, ordinary)]
    ours, theirs = (weights(model) for model in both)
    assert ours.keys() == theirs.keys() and not any(tensor.is_meta for tensor in ours.values())
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_state_dict_that_is_loaded_over_the_files_counts(tmp_path: Path) -> None:
    saved(tmp_path)
    theirs = {"lm_head.weight": torch.randn(131, 64)}
    model = from_pretrained(AutoModelForCausalLM, tmp_path)
    model.load_state_dict(theirs, strict=False)
    assert [name for name, p in model.named_parameters() if not p.is_meta] == ["lm_head.weight"]
    sharded(model, silent_mesh(2, 1))
    assert torch.equal(model.lm_head.weight, theirs["lm_head.weight"][-model.lm_head.weight.shape[0] :])


def test_what_cannot_be_kept_is_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ValueError, match="from_pretrained: device_map: setup decides"):
        from_pretrained(AutoModelForCausalLM, tmp_path, device_map="auto")
    with pytest.raises(ValueError, match="resize_token_embeddings: the embeddings of this model are not read yet"):
        from_pretrained(AutoModelForCausalLM, tmp_path).resize_token_embeddings(200)
