"""The user's config: every source gives the same config, and every mistake a sentence that names the field."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_autotp import AutoTPConfig, AutoTPPresets, PartitionType, TPConfig, TPLayerSpec, TPTrainingConfig
from lightning_autotp.config.dtypes import parse_dtype

load = TPTrainingConfig.load
CONFIGS = sorted(p for p in Path(__file__).parents[2].joinpath("configs").iterdir() if p.suffix in (".yaml", ".json"))
RULES: dict[str, Any] = {
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": [r".*qkv\.weight$"], "shape": [[64, 16, 16], -1]},
        {"patterns": [r".*out\.weight$"], "partition_type": "row"},
    ],
}
FULL: dict[str, Any] = {
    "autotp_size": 4,
    "dtype": "bf16",
    "tp_overlap_comm": True,
    "preset_model": "llama",
    "partition_config": RULES,
    "tensor_parallel": {"tp_size": 4},
}


class Mpu:
    """What Megatron-like libraries call a model parallel unit."""

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_group(self) -> object:
        return object()

    def get_model_parallel_world_size(self) -> int:
        return 2

    get_data_parallel_rank = get_model_parallel_rank
    get_data_parallel_group = get_model_parallel_group
    get_data_parallel_world_size = get_model_parallel_world_size


class HalfAnMpu:
    def get_model_parallel_rank(self) -> int:
        return 0

    get_model_parallel_group = "not a method"


def written(folder: Path, name: str, document: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps(document) if name.endswith(".json") else yaml.safe_dump(document))
    return path


def warned_fields(make: Callable[[], Any]) -> Counter[str]:
    """How often each field was said to have no effect."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    messages = [str(w.message) for w in caught if "has no effect here" in str(w.message)]
    return Counter(message.split("`")[1] for message in messages)


# -- defaults and meaning ---------------------------------------------------------------------------------------------


def test_defaults_are_deepspeeds_and_leave_tensor_parallelism_off() -> None:
    config = TPTrainingConfig()
    assert config.autotp_size == 0
    assert config.dtype is torch.float16
    assert config.tp_overlap_comm is False
    assert config.partition_config is None and config.rules is None
    assert config.preset_model is None
    assert config.tensor_parallel == TPConfig(tp_size=1, mpu=None, tp_group=None)
    assert config.size == 1
    assert config.model_fields_set == set()


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({}, 1),
        ({"autotp_size": 0}, 1),
        ({"autotp_size": 1}, 1),
        ({"autotp_size": 4}, 4),
        ({"tensor_parallel": {"tp_size": 4}}, 4),
        ({"tp": {"tp_size": 4}}, 4),
        ({"autotp_size": 0, "tp": {"tp_size": 4}}, 4),
        ({"autotp_size": 4, "tp": {"tp_size": 1}}, 4),
        ({"autotp_size": 4, "tp": {"tp_size": 4}}, 4),
    ],
)
def test_size_in_force(given: dict[str, Any], size: int) -> None:
    assert load(given).size == size


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (["bf16", "bfloat16", "torch.bfloat16", "BF16", "Torch.BFloat16", torch.bfloat16], torch.bfloat16),
        (["fp16", "float16", "half", "torch.float16", "torch.half", torch.float16, torch.half], torch.float16),
        (["fp32", "float32", "float", "torch.float32", torch.float32], torch.float32),
        (["fp64", "float64", "double", "torch.float64", torch.float64], torch.float64),
    ],
)
def test_dtype_has_many_spellings(names: list[Any], dtype: torch.dtype) -> None:
    assert [load({"dtype": name}).dtype for name in names] == [dtype] * len(names)
    assert [parse_dtype(name) for name in names] == [dtype] * len(names)


def test_only_fields_that_were_given_count_as_set() -> None:
    assert load({"autotp_size": 2}).model_fields_set == {"autotp_size"}
    assert load(load({"autotp_size": 2}), preset_model="llama").model_fields_set == {"autotp_size", "preset_model"}
    assert "dtype" in load({"dtype": "fp16"}).model_fields_set


@pytest.mark.parametrize("name", [*AutoTPPresets.names(), "LLaMA"])
def test_presets_are_known_by_name_in_any_case(name: str) -> None:
    assert load({"preset_model": name}).preset_model == name


def test_rules_are_read_from_partition_config() -> None:
    rules = load({"partition_config": RULES}).rules
    assert rules == AutoTPConfig(
        [
            TPLayerSpec([r".*qkv\.weight$"], shape=((64, 16, 16), -1)),
            TPLayerSpec([r".*out\.weight$"], PartitionType.ROW),
        ],
        use_default_specs=False,
    )
    assert load({"partition_config": rules}).rules == rules


def test_mpu_and_group_are_kept_as_they_are() -> None:
    mpu, group = Mpu(), lambda: None
    assert load({"tp": {"mpu": mpu}}).tensor_parallel.mpu is mpu
    assert load({"tp": {"tp_group": group}}).tensor_parallel.tp_group is group
    assert load(None, tensor_parallel=TPConfig(mpu=mpu)).tensor_parallel.mpu is mpu


# -- sources ----------------------------------------------------------------------------------------------------------


def test_all_sources_give_the_same_config(tmp_path: Path) -> None:
    want = TPTrainingConfig(**FULL)
    assert (want.size, want.dtype, want.preset_model) == (4, torch.bfloat16, "llama")
    deepspeed = {"train_batch_size": 8, "bf16": {"enabled": True}, "tensor_parallel": FULL}
    sources: list[Any] = [
        want,
        FULL,
        FULL | {"dtype": torch.bfloat16},
        written(tmp_path, "c.yaml", FULL),
        written(tmp_path, "c.yml", FULL),
        str(written(tmp_path, "c.json", FULL)),
        written(tmp_path, "deepspeed.json", deepspeed),
        deepspeed,
    ]
    for source in sources:
        assert load(source) == want, source
    assert load(None, **FULL) == want


def test_nothing_given_is_the_default() -> None:
    assert load(None) == load({}) == TPTrainingConfig()


def test_loading_does_not_change_its_source() -> None:
    source = TPTrainingConfig(**FULL)
    document = json.loads(json.dumps(FULL))
    load(source, autotp_size=8, tensor_parallel={"tp_size": 8})
    load(document, autotp_size=8, tensor_parallel={"tp_size": 8})
    assert source == TPTrainingConfig(**FULL)
    assert document == FULL


@pytest.mark.parametrize(
    "section",
    [{"autotp_size": 2}, {"autotp_size": 2, "tp": {"tp_size": 1}}, {"tp": {"tp_size": 2}}],
    ids=["autotp_size", "both", "nested"],
)
def test_tensor_parallel_section_of_a_deepspeed_file_is_read(section: dict[str, Any], tmp_path: Path) -> None:
    document = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "tensor_parallel": section,
    }
    assert load(written(tmp_path, "ds.json", document)).size == 2


def test_empty_tensor_parallel_section_of_a_deepspeed_file_leaves_it_off(tmp_path: Path) -> None:
    assert load(written(tmp_path, "ds.json", {"train_batch_size": 8, "tensor_parallel": {}})).size == 1


def test_nested_field_of_ours_is_no_deepspeed_section() -> None:
    config = load({"tensor_parallel": {"tp_size": 2}, "preset_model": "llama"})
    assert (config.size, config.preset_model) == (2, "llama")


@pytest.mark.parametrize("kind", ["mapping", "object", "yaml", "deepspeed"])
def test_overrides_win(kind: str, tmp_path: Path) -> None:
    base: dict[str, Any] = {"autotp_size": 2, "preset_model": "llama", "dtype": "fp32"}
    sources: dict[str, Any] = {
        "mapping": base,
        "object": TPTrainingConfig(**base),
        "yaml": written(tmp_path, "c.yaml", base),
        "deepspeed": {"train_batch_size": 1, "tensor_parallel": base},
    }
    config = load(sources[kind], autotp_size=4, preset_model="qwen2", partition_config=RULES)
    assert (config.size, config.preset_model, config.dtype) == (4, "qwen2", torch.float32)
    assert config.rules == AutoTPConfig.from_dict(RULES)


@pytest.mark.parametrize("ready", [False, True], ids=["mapping", "object"])
@pytest.mark.parametrize("override", ["tp", "tensor_parallel"])
@pytest.mark.parametrize("given", ["tp", "tensor_parallel"])
def test_override_wins_under_either_name_of_the_nested_section(given: str, override: str, ready: bool) -> None:
    source: dict[str, Any] = {given: {"tp_size": 2}}
    config = load(TPTrainingConfig(**source) if ready else source, **{override: {"tp_size": 4}})
    assert config.size == 4


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_config_loads(path: Path) -> None:
    """Files for the strategy as they are; of files for the command line, what they give to the strategy."""
    document = yaml.safe_load(path.read_text())
    if "trainer" in document:
        given = document["trainer"]["strategy"]["init_args"]
        config = load(given.get("config"), **{k: v for k, v in given.items() if k in TPTrainingConfig.model_fields})
    else:
        config = load(path)
    assert config.size > 1


def test_there_are_shipped_configs() -> None:
    assert {path.suffix for path in CONFIGS} == {".yaml", ".json"}


# -- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [{}, FULL, {"autotp_size": 2, "partition_config": RULES}], ids=["empty", "full", "rules"]
)
def test_dump_can_be_validated_again(given: dict[str, Any]) -> None:
    config = TPTrainingConfig(**given)
    assert TPTrainingConfig.model_validate(config.model_dump()) == config
    assert TPTrainingConfig.model_validate(config.model_dump(by_alias=True)) == config
    assert TPTrainingConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_dump_can_be_written_and_read(suffix: str, tmp_path: Path) -> None:
    config = load(FULL, partition_config=AutoTPConfig.from_dict(RULES))
    read = load(written(tmp_path, f"c.{suffix}", config.model_dump(exclude_unset=True)))
    assert read.rules == config.rules == AutoTPConfig.from_dict(RULES)
    assert (read.size, read.dtype, read.preset_model) == (config.size, config.dtype, config.preset_model)
    assert read.model_fields_set == config.model_fields_set


@pytest.mark.parametrize(
    "rules",
    [
        AutoTPConfig([TPLayerSpec(["a"], PartitionType.ROW)]),
        {"layer_specs": [TPLayerSpec(["a"], PartitionType.ROW)]},
        {"layer_specs": [{"patterns": ["a"], "partition_type": PartitionType.ROW}]},
    ],
    ids=["config object", "spec objects", "enum"],
)
def test_rules_given_as_objects_can_be_dumped(rules: Any) -> None:
    config = TPTrainingConfig(autotp_size=2, partition_config=rules)
    assert config.rules == AutoTPConfig([TPLayerSpec(["a"], PartitionType.ROW)])
    dumped = yaml.safe_load(yaml.safe_dump(config.model_dump(exclude_unset=True)))
    assert load(dumped).rules == config.rules


# -- what DeepSpeed has and we do not need ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tp_grain_size", 64),
        ("injection_policy_tuple", None),
        ("keep_module_on_host", False),
        ("replace_with_kernel_inject", False),
    ],
)
def test_field_of_deepspeed_is_accepted_with_one_warning(name: str, value: Any, tmp_path: Path) -> None:
    given = {"autotp_size": 2, name: value}
    path = written(tmp_path, "ds.json", {"train_batch_size": 1, "tensor_parallel": given})
    for make in (lambda: TPTrainingConfig(**given), lambda: load(given), lambda: load(path, preset_model="llama")):
        assert warned_fields(make) == {name: 1}
        with pytest.warns(UserWarning, match=f"`{name}` has no effect here: "):
            assert make().autotp_size == 2


def test_nested_field_of_deepspeed_is_accepted_with_one_warning() -> None:
    assert warned_fields(lambda: load({"tensor_parallel": {"tp_size": 2, "tp_grain_size": 64}})) == {"tp_grain_size": 1}
    assert warned_fields(lambda: load({"autotp_size": 2, "tp": {"tp_grain_size": 64}})) == {"tp_grain_size": 1}


@pytest.mark.parametrize("name", ["tp_size", "embedding_partition_dim", "lm_head_patterns"])
def test_field_of_deepspeeds_rules_is_accepted_with_one_warning(name: str) -> None:
    def use() -> None:
        config = load({"autotp_size": 2, "partition_config": RULES | {name: 1}})
        assert config.rules == AutoTPConfig.from_dict(RULES)
        load(config, autotp_size=4)
        TPTrainingConfig.model_validate(config.model_dump())

    assert warned_fields(use) == {name: 1}


def test_whole_deepspeed_file_warns_of_each_field_once(tmp_path: Path) -> None:
    section = {
        "autotp_size": 2,
        "dtype": "torch.bfloat16",
        "tp": {"tp_size": 1, "tp_grain_size": 1},
        "injection_policy_tuple": None,
        "keep_module_on_host": False,
        "replace_with_kernel_inject": False,
        "partition_config": RULES | {"tp_size": 2, "embedding_partition_dim": 0, "lm_head_patterns": ["head"]},
    }
    path = written(tmp_path, "ds.json", {"zero_optimization": {"stage": 0}, "tensor_parallel": section})
    warned = warned_fields(lambda: load(path).rules)
    assert set(warned.values()) == {1}
    assert set(warned) == {
        "tp_grain_size",
        "injection_policy_tuple",
        "keep_module_on_host",
        "replace_with_kernel_inject",
        "tp_size",
        "embedding_partition_dim",
        "lm_head_patterns",
    }


def test_a_clean_config_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(FULL).rules is not None


# -- mistakes ---------------------------------------------------------------------------------------------------------


def rule(**options: Any) -> dict[str, Any]:
    return {"partition_config": {"layer_specs": [{"patterns": ["a"]} | options]}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        # unknown fields, with the nearest name
        ({"autotp_sise": 2}, r"unknown field 'autotp_sise'\. Did you mean 'autotp_size'\?"),
        ({"tp_size": 2, "autotp_size": 2}, r"unknown field 'tp_size'\. Did you mean"),
        ({"preset": "llama"}, r"unknown field 'preset'\. Did you mean 'preset_model'\?"),
        ({"autotp_size": 2, "zzzz": 1}, r"unknown field 'zzzz'\. Fields: autotp_size, dtype"),
        ({"zzzz": 1}, r"'zzzz'.*[Ff]ields"),
        ({"tp": {"tp_sise": 2}}, r"tp\n.*unknown field 'tp_sise'\. Did you mean 'tp_size'\?"),
        ({"partition_config": {"layer_spec": []}}, r"unknown field 'layer_spec'\. Did you mean 'layer_specs'\?"),
        (rule(gather=True), r"unknown field 'gather'\. Did you mean 'gather_output'\?"),
        # unknown presets, with the list
        (
            {"preset_model": "lama"},
            r"preset_model: there is no preset 'lama'\. Did you mean 'llama'\? Presets: llama, bloom, chatglm, mixtral,"
            r" deepseek_v2, qwen2, phi3",
        ),
        ({"preset_model": "zzz"}, r"there is no preset 'zzz'\. Presets: llama"),
        ({"preset_model": 3}, r"preset_model: 3 is not a name; write one of llama, bloom"),
        # sizes
        ({"autotp_size": -1}, r"autotp_size: -1 is negative; 0 turns tensor parallelism off"),
        ({"autotp_size": "four"}, r"autotp_size: 'four' is not a whole number of ranks; write a number"),
        ({"autotp_size": 2.5}, r"autotp_size: 2\.5 is not a whole number of ranks"),
        ({"tp": {"tp_size": -1}}, r"tp\.tp_size\n.*tp_size: -1 is not a positive number of ranks"),
        ({"tensor_parallel": {"tp_size": -1}}, r"tensor_parallel\.tp_size\n.*tp_size: -1 is not a positive"),
        ({"tensor_parallel": {"tp_size": 0}}, r"tensor_parallel\.tp_size\n.*tp_size: 0 is not a positive"),
        ({"autotp_size": 4, "tp": {"tp_size": 2}}, r"tensor_parallel\.tp_size 2 contradicts autotp_size 4; leave one"),
        ({"autotp_size": 1, "tp": {"tp_size": 2}}, r"tensor_parallel\.tp_size 2 contradicts autotp_size 1"),
        # rules
        (rule(patterns=["(a"]), r"partition_config\n.*patterns: '\(a' is not a regular expression: missing \)"),
        (rule(patterns="a"), r"patterns: 'a' is not a list; write \['a'\]"),
        (rule(patterns=[]), r"patterns: the list is empty"),
        (rule(model_types="llama"), r"model_types: 'llama' is not a list; write \['llama'\]"),
        (rule(partition_type="diagonal"), r"partition_type: 'diagonal' is not one of 'row', 'column', 'skip'"),
        (rule(shape=[0, -1]), r"shape: 0 in \(0, -1\) is neither a size of at least 1 nor -1"),
        (rule(shape="2,-1"), r"shape: '2,-1' is not a list of sizes"),
        (rule(shape=[2, [4, 4]]), r"shape: only the entry at partition_dim 0 may list sub-parameters"),
        (rule(shape=[["q", "x"], -1]), r"shape: the sub-parameters \('q', 'x'\)"),
        (rule(partition_dim=7), r"partition_dim: 7 is out of range"),
        (rule(shape=[2, -1], partition_dim=2), r"partition_dim: 2 is out of range for shape \(2, -1\)"),
        (rule(shape=[2, -1], partition_dim="0"), r"partition_dim: '0' is not a whole number"),
        ({"partition_config": {"layer_specs": "a"}}, r"layer_specs: a list of rules belongs here, not 'a'"),
        ({"partition_config": {"layer_specs": [{}]}}, r"layer_specs: a rule has no `patterns`"),
        ({"partition_config": {"strict_mode": "yes"}}, r"strict_mode: 'yes' is not true or false"),
        ({"partition_config": "rules.json"}, r"partition_config.*not a mapping"),
        ({"partition_config": [{"patterns": ["a"]}]}, r"partition_config.*not a mapping"),
        # dtypes
        ({"dtype": "int8"}, r"dtype: 'int8' is not a floating-point dtype; names are bf16, bfloat16"),
        ({"dtype": "bf-16"}, r"dtype: 'bf-16' is not a floating-point dtype"),
        ({"dtype": torch.int32}, r"dtype: torch\.int32 is not a floating-point dtype"),
        ({"dtype": 16}, r"dtype: 16 is not a floating-point dtype"),
        # groups
        (
            {"tp": {"mpu": HalfAnMpu()}},
            r"mpu: HalfAnMpu lacks get_model_parallel_group, get_model_parallel_world_size, get_data_parallel_rank,"
            r" get_data_parallel_group, get_data_parallel_world_size",
        ),
        ({"tensor_parallel": {"tp_group": 3}}, r"tp_group: 3 is neither a process group nor a callable"),
        ({"tensor_parallel": {"mpu": "megatron"}}, r"mpu: str lacks get_model_parallel_rank"),
        (
            {"tp": {"mpu": Mpu(), "tp_group": lambda: None}},
            r"mpu and tp_group both say which ranks work together; give one",
        ),
        (
            {"tp": {"tp_size": 2}, "tensor_parallel": {"tp_size": 2}},
            r"tp and tensor_parallel are two names of one field",
        ),
        ({"tensor_parallel": 4}, r"tensor_parallel: 4 is not a mapping with tp_size, mpu, tp_group; the size alone"),
        ({"tp_overlap_comm": "maybe"}, r"tp_overlap_comm: 'maybe' is neither true nor false"),
    ],
)
def test_mistake_is_refused_in_a_sentence_that_names_the_field(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load(given)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load(None, **given)
