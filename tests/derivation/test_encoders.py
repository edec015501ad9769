"""Encoders, vision and speech models of transformers without rules: proved, right by an independent judge, sharded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lightning_autotp.config.training_config import TPTrainingConfig
from lightning_autotp.derivation.derive import derive
from lightning_autotp.proof.prover import Look
from lightning_autotp.proof.step import loss_of_batch
from tests.derivation.judge import share
from tests.helpers.truth import Trial, error_of, unsharded

Batch = dict[str, Any]

ROWS, TOKENS, VOCAB = 5, 12, 99

TEXT = {
    **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 8, "max_position_embeddings": 64},
}
VISION = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8},
    **{"image_size": 32, "patch_size": 8},
}


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(seed: int) -> Batch:
    ids = torch.randint(3, VOCAB, (ROWS, TOKENS), generator=drawn(seed))
    return {"input_ids": ids, "labels": ids}


def images(seed: int) -> Batch:
    return {"pixel_values": torch.randn(ROWS, 3, 32, 32, generator=drawn(seed)), "labels": torch.arange(ROWS) % 3}


def pairs(seed: int) -> Batch:
    """Images and texts that are compared."""
    return {
        "input_ids": tokens(seed)["input_ids"],
        "pixel_values": images(seed)["pixel_values"],
        "return_loss": True,
    }


def sounds(seed: int) -> Batch:
    return {"input_features": torch.randn(ROWS, 8, 32, generator=drawn(seed)), "labels": tokens(seed)["labels"]}


def waves(seed: int) -> Batch:
    return {"input_values": torch.randn(ROWS, 400, generator=drawn(seed)), "labels": torch.arange(ROWS) % 3}


@dataclass(frozen=True)
class Case:
    """A model by its classes in transformers, what makes it small, a batch, and the most that a rank of 2 may hold."""

    model: str
    config: str
    sizes: dict[str, Any]
    batch: Callable[[int], Batch]
    share: float = 0.53

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.sizes)
        for name in vars(config):
            if "drop" in name and isinstance(getattr(config, name), float):
                setattr(config, name, 0.0)
        model: nn.Module = getattr(transformers, self.model)(config)
        return model.train()


WHISPER = {
    **{"vocab_size": VOCAB, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 8},
    **{"decoder_attention_heads": 8, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "num_mel_bins": 8},
    **{"max_source_positions": 16, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1},
    **{"eos_token_id": 2, "decoder_start_token_id": 1},
}
WAV2VEC2 = {
    **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 96},
    **{"conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "apply_spec_augment": False},
    **{"num_labels": 3, "classifier_proj_size": 32, "vocab_size": 32},
}
DEBERTA = {"pad_token_id": 0, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 16}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [1, 1], "num_heads": [4, 4], "window_size": 4}
XGLM = {"vocab_size": VOCAB, "d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 8}
CONVNEXT = {"patch_size": 4, "hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "image_size": 32}

TWO_TOWERS = {"text_config": {**TEXT, "eos_token_id": 2, "projection_size": 64}, "vision_config": VISION}

CASES = {
    "deberta-v2": Case("DebertaV2ForMaskedLM", "DebertaV2Config", {**TEXT, **DEBERTA}, tokens),
    "whisper": Case("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, sounds),
    "swin": Case("SwinForImageClassification", "SwinConfig", {**SWIN, "num_labels": 3}, images),
    "persimmon": Case("PersimmonForCausalLM", "PersimmonConfig", TEXT, tokens),
    "xglm": Case("XGLMForCausalLM", "XGLMConfig", XGLM, tokens),
    "biogpt": Case("BioGptForCausalLM", "BioGptConfig", TEXT, tokens),
    "modernbert": Case("ModernBertForMaskedLM", "ModernBertConfig", {**TEXT, "pad_token_id": 0}, tokens),
    "dinov2": Case("Dinov2ForImageClassification", "Dinov2Config", {**VISION, "num_labels": 3}, images),
    "vit": Case("ViTForImageClassification", "ViTConfig", {**VISION, "num_labels": 3}, images),
    "convnext": Case("ConvNextForImageClassification", "ConvNextConfig", {**CONVNEXT, "num_labels": 3}, images, 0.6),
    "wav2vec2": Case("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", WAV2VEC2, waves, 0.62),
}

CASES |= {
    "clip": Case("CLIPModel", "CLIPConfig", TWO_TOWERS | {"projection_dim": 32}, pairs, 0.52),
    "siglip": Case("SiglipModel", "SiglipConfig", TWO_TOWERS, pairs, 0.56),
}

QUICK = ("deberta-v2", "whisper", "swin")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in CASES]
)
def test_a_derived_plan_is_right(name: str) -> None:
    case, config = CASES[name], TPTrainingConfig(autotp_size=2)
    model = case.build()
    found = derive(model, Look("training", (case.batch(9),), call=loss_of_batch), config, 2)
    assert found.verdict.kind == "proved", found.verdict.listed
    assert share(found.plan, {name for name, _ in model.named_parameters()}) <= case.share
    trial = Trial(model, found.plan, config, [case.batch(seed) for seed in (5, 6, 7)])
    assert error_of(trial, unsharded(trial)) < 1e-8
