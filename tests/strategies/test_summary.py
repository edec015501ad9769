"""What Lightning's summary, Hugging Face and PEFT say of a sharded model: the full model's numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary
from torch import nn

from lightning_autotp import AutoTPStrategy
from lightning_autotp.model_sources.small import small_config, small_model
from tests.helpers.models import LanguageModel, quiet_trainer, token_loader
from tests.helpers.small_nets import Regressor, strategy, trainer


@pytest.mark.parametrize("kind", [ModelSummary, RichModelSummary])
@pytest.mark.ranks(2)
def test_the_summary_counts_the_full_model_and_what_a_rank_holds(kind: Any) -> None:
    model, callback = Regressor(), kind(max_depth=2)
    model.net.norm.requires_grad_(False)
    full = sum(p.numel() for p in model.parameters())
    run = trainer(strategy(2), callbacks=[callback], enable_model_summary=True, max_epochs=1)
    run.fit(model)
    said = callback._summary(run, model)
    assert (said.total_parameters, said.trainable_parameters) == (full, full - 16)
    columns = dict(said._get_summary_data())
    rows = {name: (columns["Params"][at], columns["Params per Device"][at]) for at, name in enumerate(columns["Name"])}
    assert {name: (of.strip(), own.strip()) for name, (of, own) in rows.items()} == {
        "net": ("194", "109"),
        "net.norm": ("16", "16"),
        "net.up": ("90", "45"),
        "net.down": ("88", "48"),
    }


def llama() -> nn.Module:
    return small_model(small_config("llama"))


def adapted() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    made: Any = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    return made


@pytest.mark.ranks(2)
def test_hugging_face_and_peft_models_count_full_parameters() -> None:
    for factory in (llama, adapted):
        model = LanguageModel(factory)
        quiet_trainer(strategy=AutoTPStrategy(autotp_size=2), max_epochs=0).fit(model, token_loader(vocab=100))
        for inner, want in ((model.model, factory()), (copy.deepcopy(model.model), factory())):
            here: Any = inner
            there: Any = want
            for options in ({}, {"only_trainable": True}, {"exclude_embeddings": True}):
                assert here.num_parameters(**options) == there.num_parameters(**options), options
            if factory is adapted:
                assert here.get_nb_trainable_parameters() == there.get_nb_trainable_parameters()
            with pytest.raises(RuntimeError, match=r"lightning_autotp\.save_pretrained"):
                here.save_pretrained("nowhere")


@pytest.mark.ranks(1)
def test_without_tensor_parallelism_nothing_is_put_on_models(tmp_path: Any) -> None:
    model = LanguageModel(llama)
    quiet_trainer(strategy=AutoTPStrategy(), max_epochs=0).fit(model, token_loader(vocab=100))
    inner: Any = model.model
    assert "save_pretrained" not in vars(inner)
    inner.save_pretrained(tmp_path / "own")
    assert (tmp_path / "own" / "model.safetensors").exists()
