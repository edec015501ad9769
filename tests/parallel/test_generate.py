"""``generate`` of a sharded model gives the unsharded model's tokens, whatever is asked of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_autotp import TPTrainingConfig, make_plan
from lightning_autotp.distributed.lockstep import Lockstep
from lightning_autotp.distributed.mesh import Mesh
from lightning_autotp.model_sources.small import small_config, small_model
from lightning_autotp.proof.copying import alias_copy
from lightning_autotp.sharding.shard import shard
from tests.helpers.corners import corners_of

NEW = 5

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no-cache": {"use_cache": False},
    "one-row": {"rows": 1},
    "padded": {"padded": True},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "several-samples": {"do_sample": True, "num_return_sequences": 2, "top_p": 0.9},
    "beams": {"num_beams": 3},
    "padded-beams": {"num_beams": 2, "padded": True, "num_return_sequences": 2, "length_penalty": 0.5},
    "sampled-beams": {"num_beams": 2, "do_sample": True},
    "static-cache": {"cache_implementation": "static"},
    "padded-static-cache": {"cache_implementation": "static", "padded": True},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "rows": 2},
}
SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sequence": {"sequence_parallel": True},
    "loss": {"loss_parallel": True},
    "fused": {"loss_parallel": "fused"},
    "all": {"sequence_parallel": True, "loss_parallel": True, "tp_overlap_comm": True},
    "saved": {"shard_saved_activations": True},
}
MODELS = (
    *("llama", "gpt2", "mixtral", "qwen3", "bloom", "t5", "gemma2", "gpt_oss", "deepseek_v2", "falcon", "qwen3_moe"),
    *("opt", "phi3", "gpt_neox"),
)
REFUSED = {"t5": {"sequence_parallel", "loss_parallel"}, "opt": {"sequence_parallel"}}
"""Switches that a model is refused with."""

QUICK = [
    ("llama", "beams", "plain", 2),
    ("mixtral", "greedy", "all", 4),
    ("gpt2", "padded-beams", "plain", 4),
    ("t5", "padded-beams", "plain", 4),
    ("bloom", "padded-beams", "plain", 4),
    ("qwen3", "greedy", "all", 4),
    ("gpt_oss", "greedy", "all", 4),
]
"""What is tried always."""


ALWAYS = (("greedy", "all"), ("padded-beams", "plain"))


def cases() -> list[tuple[str, str, str, int]]:
    """Every way with every switch, dealt out over models and sizes; every model with greedy and with padded beams."""
    found = []
    for at, way in enumerate(WAYS):
        for number, switches in enumerate(SWITCHES):
            model = MODELS[(5 * at + number) % len(MODELS)]
            found.append((model, way, switches, (2, 4)[(at + number) % 2]))
    found += [(model, way, switches, 4) for model in MODELS for way, switches in ALWAYS]
    found += [("llama", way, "all", 2) for way in WAYS] + QUICK
    return sorted({case for case in found if not REFUSED.get(case[0], set()) & SWITCHES[case[2]].keys()})


def generated(model: Any, way: dict[str, Any]) -> Tensor:
    options = {"do_sample": False, **way}
    rows, padded = options.pop("rows", 3), options.pop("padded", False)
    prompts = torch.randint(5, 50, (rows, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(rows, 5).long()
    if padded:
        mask[1, :2] = 0
        mask[2, :1] = 0
        prompts = prompts.masked_fill(mask == 0, 0)
    torch.manual_seed(7)
    tokens: Tensor = model.generate(
        prompts, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0, **options
    )
    return tokens


@pytest.mark.parametrize("model_type,way,switches,size", corners_of(cases(), QUICK))
def test_the_tokens_are_the_unsharded_models(model_type: str, way: str, switches: str, size: int) -> None:
    model: Any = small_model(small_config(model_type)).eval()
    config = TPTrainingConfig.load(SWITCHES[switches])
    plan = make_plan(model, config, size)

    def of_rank(mesh: Mesh) -> Tensor:
        copy: Any = alias_copy(model)
        shard(copy, plan, mesh, config, device=torch.device("cpu"), training=False)
        return generated(copy.eval(), WAYS[way])

    found = Lockstep[Tensor](size).run(of_rank)
    want = generated(model, WAYS[way])
    assert want.shape[1] > NEW and all(torch.equal(tokens, want) for tokens in found)
