"""Small, same-shaped copies of Hugging Face models: what a plan does to a model is seen on them in seconds on a CPU.

The architecture is kept (experts, latent attention, sliding windows, hybrid layers, sinks, biases), the sizes are not:
:func:`small_config` shrinks what config fields of known names say and keeps one layer of every kind. The names are
data; what they cannot say about one architecture is data too, in ``_OVERRIDES``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from math import prod
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig
from lightning_autotp.compat import can_set_experts_implementation
from lightning_autotp.model_sources.hf import FEATURES, auto_class, task

VOCABULARY = 131
"""Odd, so that a cut vocabulary is cut unevenly."""

HIDDEN, HEADS, HEAD_DIM = 64, 8, 8

ROWS, TOKENS = 5, 12
"""Rows that 2, 3 and 4 ranks do not divide, where a mistake that mixes tokens shows; tokens that they do divide."""

SWEEP = [
    *("bloom", "gpt2", "opt", "falcon", "mpt", "gpt_oss", "gptj", "gpt_neo", "t5", "bart", "bert", "vit"),
    *("gpt_bigcode", "stablelm"),
]
"""Types to verify besides :func:`causal_types`: without a tensor parallel plan, or no causal language models."""

NOT_RUNNABLE: dict[str, str] = {}
"""The types of :func:`causal_types` and :data:`SWEEP` that do not run here, with the reason."""

_LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"),
    *("encoder_layers", "decoder_layers", "num_blocks", "depth"),
)
"""Fields that say how many layers there are."""

_SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "pooler_output_size"), HIDDEN),
    **dict.fromkeys(("ple_embed_dim",), HIDDEN),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_ff", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "intermediate_size_mlp", "dense_intermediate_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "num_expert_group", "zero_expert_num"), 2),
    **dict.fromkeys(("q_lora_rank", "ngram_vocab_size_base"), 48),
    **dict.fromkeys(("o_lora_rank", "hc_lowrank"), 24),
    **dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "d_kv", "rotary_dim"), 8),
    **dict.fromkeys(("index_n_heads", "index_topk", "indexer_n_heads", "indexer_budget"), 8),
    **dict.fromkeys(("index_head_dim", "indexer_head_dim", "max_seq_len", "dim_model_base"), 16),
    **dict.fromkeys(("linear_num_heads", "linear_num_value_heads", "linear_head_dim", "linear_key_head_dim"), 8),
    **dict.fromkeys(("linear_value_head_dim", "mamba_head_dim", "mamba_d_head", "mamba_d_state", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_chunk_size", "chunk_size", "block_size"), 8),
    **dict.fromkeys(
        ("mamba_dt_rank", "laurel_rank", "gated_norm_rank", "index_block_size", "indexer_compress_ratio"), 4
    ),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size", "window_size"), 8),
    **dict.fromkeys(("keep_window_size", "hidden_size_per_layer_input", "d_rel", "rel_extent"), 8),
    **dict.fromkeys(("n_positions",), 32),
    **dict.fromkeys(("n_groups", "index_topk_blocks", "split_ngram_parts", "num_layers_per_stack"), 2),
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "topk_group": 1,
}
"""What a field of this name becomes, unless it is None, 0 or 1."""

_KV_HEADS = ("num_key_value_heads", "num_kv_heads")

_MOST_KV_HEADS = {"mimo_v2_flash": HEADS // 2}
"""By type: its sliding layers have twice as many."""

_LAYER_NUMBERS = {"moe_layers": 0, "mlp_only_layers": 0, "ple_layer_ids": 1}
"""Fields that list layers by their numbers, with the number of the first layer."""

_DROPPED = ("qk_head_dim", "dtype", "torch_dtype", "quantization_config", "architectures", "auto_map")
"""Fields that others decide, or that are of a checkpoint."""

_OVERRIDES: dict[str, dict[str, Any]] = {
    "deepseek_v4": {
        "o_groups": 4,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 6},
        "index_topk": 2,
    },
    "dory": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        **dict.fromkeys(("n_input_layers", "n_recurrent_layers", "n_output_layers"), 1),
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hrm_text": {"num_hidden_layers": 16, "embedding_scale": 8.0},
    "inkling2_text": {
        "num_hidden_layers": 3,
        "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"],
        "n_layers_per_attn_res_block": 1,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "mimo_v2_flash": {"head_dim": 24},
    "phi4_multimodal_audio": {
        **dict.fromkeys(("ext_pw_out_channel", "depthwise_separable_out_channel", "nemo_conv_channels"), HIDDEN),
        "bias_max_distance": 16,
    },
    "phi4_multimodal_vision": {"crop_size": 56, "image_size": 56},
    "qwen4_exp_text": {"make_ngram_vocab_size_divisible_by": 8},
    "vit": {"image_size": 16, "patch_size": 4},
}
"""By type, what the names of fields cannot say. It wins over everything else."""


def small_config(source: Union[str, PathLike[str]], *, kv_heads: int = 2) -> PretrainedConfig:
    """A small config of the architecture that ``source`` describes.

    Args:
        source: a model type of transformers, or the path of a ``config.json`` or of a directory that holds one.
        kv_heads: the number of key and value heads, where the architecture has its own number of them.

    Raises:
        ValueError: if ``source`` is neither.
    """
    from transformers import CONFIG_MAPPING

    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        given = json.loads(path.read_text())
        name = given.get("model_type")
    else:
        name, given = str(source), FEATURES.get(str(source), {})
    if name not in CONFIG_MAPPING:
        raise ValueError(f"{str(source)!r} is neither a model type of transformers nor the path of a config.json.")
    cls = CONFIG_MAPPING[name]
    small = _shrunk(cls.from_dict(deepcopy(given)).to_dict(), kv_heads)
    return cls.from_dict(small, experts_implementation="eager")


def small_of(model: Any) -> nn.Module:
    """A small model of the class and the architecture of a Hugging Face model, with its attention; in fp32."""
    given = model.config
    small = type(given).from_dict(_shrunk(given.to_dict(), 2), experts_implementation="eager")
    small._attn_implementation = given._attn_implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: nn.Module = type(model)(small).float()
    _redraw(made, torch.Generator().manual_seed(0))
    return made.train()


def group_experts(model: Any) -> None:
    """Let experts be computed as transformers does by default, which cannot be in fp64: for what is to be compared."""
    if can_set_experts_implementation(model):
        model.set_experts_implementation("grouped_mm")


def small_model(config: PretrainedConfig, *, seed: int = 0, tied: Optional[bool] = None) -> nn.Module:
    """The model of a small config, in fp32: the same weights for the same arguments.

    No weight keeps a value that its class starts from: zeros (biases, sinks, output layers) would hide errors.

    Args:
        config: from :func:`small_config`; left as it is.
        seed: of the weights.
        tied: whether the head is the embedding, instead of what ``config`` says (some classes cannot tie them).
    """
    config = deepcopy(config)
    if tied is not None:
        for part in {id(part): part for part in (config, config.get_text_config())}.values():
            part.tie_word_embeddings = tied
    with torch.random.fork_rng(devices=[]), _marked_uninitialized():
        torch.manual_seed(seed)
        model: nn.Module = auto_class(config).from_config(config).float()
    _redraw(model, torch.Generator().manual_seed(seed))
    return model


def small_batches(config: PretrainedConfig, count: int, *, seed: int = 1) -> list[dict[str, Tensor]]:
    """``count`` batches of random data: keyword arguments, labels included, of the forward pass of a small model."""
    draw = torch.Generator().manual_seed(seed)

    def numbers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=draw)

    if task(config) == "image":
        shape = (ROWS, config.num_channels, config.image_size, config.image_size)
        return [
            {"pixel_values": torch.randn(shape, generator=draw), "labels": numbers(config.num_labels or 2, ROWS)}
            for _ in range(count)
        ]
    text = config.get_text_config()
    pad = getattr(text, "pad_token_id", None)

    def row() -> Tensor:  # of different tokens: equal ones may tie where tokens are chosen; padding is among them
        tokens = torch.randperm(text.vocab_size, generator=draw)
        tokens = tokens[tokens != pad][:TOKENS] if isinstance(pad, int) else tokens[:TOKENS]
        tokens[TOKENS // 2] = pad if isinstance(pad, int) else tokens[TOKENS // 2]
        return tokens

    batches = [{"input_ids": torch.stack([row() for _ in range(ROWS)])} for _ in range(count)]
    for batch in batches:
        causal = task(config) == "causal"
        batch["labels"] = batch["input_ids"].clone() if causal else numbers(text.vocab_size, ROWS, TOKENS)
    return batches


def _shrunk(given: Mapping[str, Any], kv_heads: int) -> dict[str, Any]:
    """``given`` in small: what the names of its fields say, then what the table of overrides says."""
    small = {key: _value(key, value, kv_heads) for key, value in given.items() if key not in _DROPPED}
    latent = bool(given.get("kv_lora_rank"))
    kv_heads = min(kv_heads, _MOST_KV_HEADS.get(given.get("model_type", ""), HEADS))
    for key in _KV_HEADS:
        if isinstance(given.get(key), int):
            small[key] = HEADS if latent else kv_heads if given[key] > 1 else 1
    if "head_dim" in given:
        wide = given["head_dim"] and given["head_dim"] * given.get("num_attention_heads", 1) != given.get("hidden_size")
        small["head_dim"] = small["qk_rope_head_dim"] if latent else 2 * HEAD_DIM if wide else HEAD_DIM
    if given.get("v_head_dim") and given["v_head_dim"] != given.get("qk_nope_head_dim", given.get("head_dim")):
        small["v_head_dim"] = 24
    if given.get("linear_num_key_heads"):
        shared = given["linear_num_key_heads"] != given["linear_num_value_heads"]
        small["linear_num_key_heads"] = HEADS // 2 if shared else HEADS
    for key in ("num_attention_heads", "num_key_value_heads", "head_dim"):
        if given.get(f"swa_{key}"):
            small[f"swa_{key}"] = _scaled(key, given[f"swa_{key}"], given[key], small[key])
        if layers := given.get(f"{key}_per_layer"):
            small[f"{key}_per_layer"] = [_scaled(key, each, given[key], small[key]) for each in layers]
    if small.get("linear_num_heads") or small.get("linear_num_value_heads"):
        small["rms_norm_eps"] = 1e-3  # the norm of an output that starts near zero: smaller makes rounding large
    if not given.get("rope_parameters") and given.get("max_position_embeddings"):
        small["max_position_embeddings"] = 32
    rope = small.get("rope_parameters") or {}
    rotary = (small.get("head_dim") or HEAD_DIM) * rope.get("partial_rotary_factor", 1.0)
    for key in {"short_factor", "long_factor"} & rope.keys():
        rope[key] = rope[key][: int(rotary) // 2]
    return _with_few_layers(small, given) | deepcopy(_OVERRIDES.get(given.get("model_type", ""), {}))


def _with_few_layers(small: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``small`` with only some of the layers of ``given``, among them one of every kind."""
    depth = next((given[key] for key in _LAYERS if given.get(key)), len(given.get("layers_block_type") or ()))
    if not depth:
        return small
    numbered = {key: first for key, first in _LAYER_NUMBERS.items() if isinstance(given.get(key), list)}
    lists = {
        key: value
        for key, value in small.items()
        if isinstance(value, list) and len(value) == depth and key not in numbered
    }
    layers = [
        {(key, repr(value[at])) for key, value in lists.items()}
        | {(key, repr(at + first in given[key])) for key, first in numbered.items()}
        for at in range(depth)
    ]
    own = depth - (given.get("num_kv_shared_layers") or 0)
    kept = _cover(layers[:own]) + [own + at for at in _cover(layers[own:])]
    small = small | {key: [value[at] for at in kept] for key, value in lists.items()}
    small |= {
        key: [new + first for new, at in enumerate(kept) if at + first in given[key]] for key, first in numbered.items()
    }
    small |= {key: len(kept) for key in _LAYERS if small.get(key)}
    if own < depth:
        small["num_kv_shared_layers"] = sum(at >= own for at in kept)
    if given.get("per_layer_config"):
        wanted = {int(at): value for at, value in given["per_layer_config"].items()}
        small["per_layer_config"] = {
            new: _layer(wanted[at], given, small) for new, at in enumerate(kept) if at in wanted
        }
    return small


def _layer(layer: Mapping[str, Any], given: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    """What one layer says otherwise than the config, in small: what is larger there stays larger."""
    shrunk = {
        key: _scaled(key, value, given[key], small[key]) if isinstance(value, int) and given.get(key) else value
        for key, value in layer.items()
    }
    if "qk_nope_head_dim" in layer:
        shrunk["head_dim"] = shrunk["qk_nope_head_dim"] + shrunk.get("qk_rope_head_dim", small["qk_rope_head_dim"])
    return shrunk


def _scaled(key: str, value: int, usual: int, small: int) -> int:
    """The small value of what is ``usual`` elsewhere, where that is ``small``."""
    scaled = small * 2 if value > usual else small // 2 if value < usual else small
    return min(scaled, HEADS) if key in _KV_HEADS else scaled


def _value(key: str, value: Any, kv_heads: int) -> Any:
    """The small value of one field."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(value, dict):
        return _shrunk(value, kv_heads) if key.endswith("_config") and key != "per_layer_config" else value
    if isinstance(value, list) and key in _SIZES:
        return [_value(key, each, kv_heads) for each in value]
    if key == "use_cache":
        return False
    if re.search("drop|jitter", key) and number:
        return type(value)(0)
    if key.endswith(("_token_id", "_token_index")) and value is not None:
        first = value[0] if isinstance(value, list) else value
        return first if first < VOCABULARY else VOCABULARY - 1
    return _SIZES[key] if key in _SIZES and number and value > 1 else value


def _cover(layers: Sequence[set[tuple[str, str]]]) -> list[int]:
    """The fewest of ``layers`` (two, if there are) that show everything that is said of any of them."""
    missing = set().union(*layers)
    kept: list[int] = []
    while missing or len(kept) < min(2, len(layers)):
        left = [at for at in range(len(layers)) if at not in kept]
        kept.append(max(left, key=lambda at: len(layers[at] & missing)))
        missing -= layers[kept[-1]]
    return sorted(kept)


@contextmanager
def _marked_uninitialized() -> Iterator[None]:
    """Inside, memory that nothing was written to is NaN (or the largest integer), not what was there before."""
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled


@torch.no_grad()
def _redraw(model: Any, draw: torch.Generator) -> None:
    """Draw every parameter anew, so that activations stay of order one and nothing is zero."""
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=draw)
        if name.endswith(".A"):  # scales what the tokens to attend to are chosen by
            parameter.copy_(1 + 0.1 * noise)
        elif parameter.dim() < 2:
            parameter.copy_(parameter.nan_to_num(0.0, 0.0, 0.0) + 0.1 * noise)
        else:
            fan_in = parameter.shape[-1] if parameter.dim() < 4 else prod(parameter.shape[1:])
            parameter.copy_(noise / fan_in**0.5)
    for name, buffer in sorted(model.named_buffers()):
        if name.endswith("tid2eid"):  # the experts of each token number
            experts = torch.rand(len(buffer), model.config.n_routed_experts, generator=draw).argsort(1)
            buffer.copy_(experts[:, : buffer.shape[1]])
        if buffer.is_floating_point():
            noise = torch.randn(buffer.shape, generator=draw) if name.endswith("bias") else torch.zeros(())
            buffer.copy_(buffer.nan_to_num(0.0) + 0.1 * noise)
