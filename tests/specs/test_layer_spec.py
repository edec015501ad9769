"""What a rule may say, what it refuses and in which words, and how sets of rules are merged."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest

from lightning_autotp import AutoTPConfig, PartitionType, TPLayerSpec, merge_autotp_configs


def spec(name: str, **options: Any) -> TPLayerSpec:
    return TPLayerSpec([rf".*{name}\.weight$"], **options)


@pytest.mark.parametrize("value", ["row", "ROW", "Row", PartitionType.ROW])
def test_partition_type_is_read_in_any_case(value: Any) -> None:
    assert PartitionType.parse(value) is PartitionType.ROW
    assert TPLayerSpec(["a"], value).partition_type is PartitionType.ROW


def test_partition_types_are_their_own_names() -> None:
    assert [t.value for t in PartitionType] == ["row", "column", "skip"]
    assert [PartitionType[name.upper()].value for name in ("row", "column", "skip")] == ["row", "column", "skip"]


@pytest.mark.parametrize("value", ["rows", "", 1, None, ["row"]])
def test_unknown_partition_type_is_refused_with_the_known_ones(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^partition_type: .* is not one of 'row', 'column', 'skip'"):
        TPLayerSpec(["a"], value)


def test_defaults_of_a_rule() -> None:
    rule = TPLayerSpec(["a"])
    assert rule == TPLayerSpec(
        patterns=["a"],
        partition_type=PartitionType.COLUMN,
        shape=None,
        partition_dim=None,
        model_types=None,
        gather_output=False,
        split_input=False,
        grad_allreduce=False,
        partial_outputs=None,
        boundary=False,
    )


@pytest.mark.parametrize(
    ("partition_type", "options", "cut_dim"),
    [
        ("column", {}, 0),
        ("row", {}, 1),
        ("column", {"partition_dim": 0}, 0),
        ("row", {"partition_dim": 1}, 1),
        ("column", {"shape": (2, -1)}, 0),
        ("row", {"shape": (-1, 2)}, 1),
        ("column", {"shape": (4, 2, -1), "partition_dim": 1}, 1),
    ],
)
def test_cut_dim(partition_type: str, options: dict[str, Any], cut_dim: int) -> None:
    assert TPLayerSpec(["a"], PartitionType(partition_type), **options).cut_dim == cut_dim


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ([2, -1], (2, -1)),
        ((3, -1), (3, -1)),
        ([[64, 16, 16], -1], ((64, 16, 16), -1)),
        ([["q", "kv", "kv"], -1], (("q", "kv", "kv"), -1)),
    ],
)
def test_lists_in_a_shape_become_tuples(given: Any, kept: Any) -> None:
    assert TPLayerSpec(["a"], shape=given).shape == kept


def test_tuples_of_patterns_become_lists() -> None:
    rule = TPLayerSpec(("a", "b"), model_types=("llama",))  # type: ignore[arg-type]
    assert (rule.patterns, rule.model_types) == (["a", "b"], ["llama"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": "a"}, r"^patterns: 'a' is not a list; write \['a'\]"),
        ({"patterns": b"a"}, r"^patterns: b'a' is not a list"),
        ({"patterns": 3}, r"^patterns: 3 is not a list"),
        ({"patterns": None}, r"^patterns: None is not a list"),
        ({"patterns": ["a", 3]}, r"^patterns: 3 is not a string"),
        ({"patterns": []}, r"^patterns: the list is empty"),
        ({"patterns": ["ok", "(unclosed"]}, r"^patterns: '\(unclosed' is not a regular expression: missing"),
        ({"patterns": ["*.weight"]}, r"^patterns: '\*\.weight' is not a regular expression: nothing to repeat"),
        ({"partition_type": "diagonal"}, r"^partition_type: 'diagonal' is not one of"),
        ({"model_types": "llama"}, r"^model_types: 'llama' is not a list; write \['llama'\]"),
        ({"model_types": [1]}, r"^model_types: 1 is not a string"),
        ({"gather_output": "yes"}, r"^gather_output: 'yes' is not true or false"),
        ({"gather_output": 1}, r"^gather_output: 1 is not true or false"),
        ({"grad_allreduce": None}, r"^grad_allreduce: None is not true or false"),
        ({"partition_type": "row", "gather_output": True}, r"^gather_output: only a column rule .* this one is row"),
        ({"partition_type": "skip", "gather_output": True}, r"^gather_output: only a column rule .* this one is skip"),
        ({"grad_allreduce": True}, r"^grad_allreduce: .* partition_type 'skip', this rule is column"),
        ({"partition_type": "row", "grad_allreduce": True}, r"^grad_allreduce: .* 'skip', this rule is row"),
        ({"split_input": "yes"}, r"^split_input: 'yes' is not true or false"),
        ({"partition_type": "row", "split_input": 1}, r"^split_input: 1 is not true or false"),
        ({"split_input": True}, r"^split_input: only a row rule has an input to split, this one is column"),
        ({"partition_type": "skip", "split_input": True}, r"^split_input: only a row rule .* this one is skip"),
        ({"boundary": None}, r"^boundary: None is not true or false"),
        ({"boundary": True}, r"^boundary: a rule with it names modules, .* use partition_type 'skip'"),
        (
            {"partition_type": "row", "boundary": True},
            r"^boundary: .*use partition_type 'skip', and rules of their own",
        ),
        (
            {"partition_type": "skip", "boundary": True, "grad_allreduce": True},
            r"^boundary: .* cuts nothing itself and has no other flag",
        ),
        (
            {"partition_type": "skip", "boundary": True, "partial_outputs": 8},
            r"^boundary: .* cuts nothing itself and has no other flag",
        ),
        ({"partial_outputs": 8}, r"^partial_outputs: it goes with partition_type 'skip', this rule is column"),
        ({"partition_type": "row", "partial_outputs": "x"}, r"^partial_outputs: .*'skip', this rule is row"),
        ({"partition_type": "skip", "partial_outputs": ""}, r"^partial_outputs: '' is neither a number"),
        ({"partition_type": "skip", "partial_outputs": 8, "grad_allreduce": True}, r"^partial_outputs: .*leave one"),
        ({"partition_type": "skip", "partial_outputs": 0}, r"^partial_outputs: 0 is neither a number .* nor the name"),
        ({"partition_type": "skip", "partial_outputs": -1}, r"^partial_outputs: -1 is neither"),
        ({"partition_type": "skip", "partial_outputs": True}, r"^partial_outputs: True is neither"),
        ({"partition_type": "skip", "partial_outputs": 2.0}, r"^partial_outputs: 2.0 is neither"),
        ({"partition_type": "skip", "partial_outputs": [8]}, r"^partial_outputs: \[8\] is neither"),
        ({"partition_dim": "0"}, r"^partition_dim: '0' is not a whole number"),
        ({"partition_dim": True}, r"^partition_dim: True is not a whole number"),
        ({"partition_dim": 0.0, "shape": (2, -1)}, r"^partition_dim: 0.0 is not a whole number"),
        ({"partition_dim": 7}, r"^partition_dim: 7 is out of range without a `shape`"),
        ({"partition_dim": -1}, r"^partition_dim: -1 is out of range without a `shape`"),
        ({"partition_dim": 1}, r"^partition_dim: a column rule cuts dim 0 of a weight; 1 needs a `shape`"),
        ({"partition_type": "row", "partition_dim": 0}, r"^partition_dim: a row rule cuts dim 1 of a weight"),
        ({"shape": (2, -1), "partition_dim": 2}, r"^partition_dim: 2 is out of range for shape \(2, -1\) with 2 dims"),
        ({"shape": (2, -1), "partition_dim": -1}, r"^partition_dim: -1 is out of range for shape"),
        ({"shape": "2,-1"}, r"^shape: '2,-1' is not a list of sizes such as \[2, -1\]"),
        ({"shape": 2}, r"^shape: 2 is not a list of sizes"),
        ({"shape": []}, r"out of range for shape \(\) with 0 dims"),
        ({"shape": (0, -1)}, r"^shape: 0 in \(0, -1\) is neither a size of at least 1 nor -1"),
        ({"shape": (-2, -1)}, r"^shape: -2 in \(-2, -1\) is neither"),
        ({"shape": (2.0, -1)}, r"^shape: 2.0 in .* is neither"),
        ({"shape": (True, -1)}, r"^shape: True in .* is neither"),
        ({"shape": ("q", -1)}, r"^shape: 'q' in .* is neither"),
        ({"shape": (2, [4, 4])}, r"^shape: only the entry at partition_dim 0 may list sub-parameters"),
        ({"shape": ([], -1)}, r"^shape: the sub-parameters \(\) must be sizes of at least 1"),
        ({"shape": ([4, 0], -1)}, r"^shape: the sub-parameters \(4, 0\) must be sizes of at least 1"),
        ({"shape": ([4, -1], -1)}, r"^shape: the sub-parameters \(4, -1\) must be sizes of at least 1"),
        ({"shape": ([4, True], -1)}, r"^shape: the sub-parameters \(4, True\) must be sizes of at least 1"),
        ({"shape": (["q", "k"], -1)}, r"^shape: the sub-parameters \('q', 'k'\) must be .* or 'q' and 'kv'"),
        ({"shape": ([[4, 4], 4], -1)}, r"^shape: the sub-parameters \(\[4, 4\], 4\) must be sizes of at least 1"),
    ],
)
def test_bad_rule_is_refused_by_the_name_of_its_field(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TPLayerSpec(**({"patterns": ["a"]} | options))
    with pytest.raises(ValueError, match=message):
        AutoTPConfig.from_dict({"layer_specs": [{"patterns": ["a"]} | options]})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pattern": ["a"]}, r"^layer_specs: unknown field 'pattern'\. Did you mean 'patterns'\? Fields: patterns, "),
        ({"patterns": ["a"], "type": "row"}, r"^layer_specs: unknown field 'type'.* Fields: .*partition_type"),
        ({"partition_type": "row"}, r"^layer_specs: a rule has no `patterns`"),
        ("a", r"^layer_specs: 'a' is not a mapping"),
        (["a"], r"^layer_specs: \['a'\] is not a mapping"),
    ],
)
def test_bad_mapping_of_a_rule_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TPLayerSpec.from_dict(given)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("row", {"split_input": True}),
        ("column", {"gather_output": True}),
        ("skip", {"grad_allreduce": True}),
        ("skip", {"partial_outputs": 8}),
        ("skip", {"partial_outputs": "qk_rope_head_dim"}),
        ("skip", {"boundary": True}),
        ("row", {"shape": (-1, -1, -1), "partition_dim": 1}),
        ("column", {"shape": (-1, -1, -1, 2), "partition_dim": 2}),
    ],
)
def test_what_goes_together_is_kept(kind: str, options: dict[str, Any]) -> None:
    rule = TPLayerSpec.from_dict({"patterns": ["a"], "partition_type": kind, **options})
    assert rule.partition_type is PartitionType(kind)
    assert {name: getattr(rule, name) for name in options} == options


def test_a_rule_cannot_be_changed_behind_its_checks() -> None:
    rule = TPLayerSpec(["a"])
    with pytest.raises(AttributeError):
        rule.partition_dim = 7  # type: ignore[misc]


def test_defaults_of_a_set_of_rules() -> None:
    config = AutoTPConfig()
    assert (config.layer_specs, config.use_default_specs, config.strict_mode) == ([], True, False)
    assert AutoTPConfig.from_dict({}) == config


def test_from_dict_reads_rules_in_order() -> None:
    config = AutoTPConfig.from_dict(
        {
            "use_default_specs": False,
            "strict_mode": True,
            "layer_specs": [{"patterns": ["a"], "partition_type": "row"}, TPLayerSpec(["b"])],
        }
    )
    assert config == AutoTPConfig([TPLayerSpec(["a"], PartitionType.ROW), TPLayerSpec(["b"])], False, True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layer_spec": []}, r"^partition_config: unknown field 'layer_spec'\. Did you mean 'layer_specs'\?"),
        ({"strict": True}, r"^partition_config: unknown field 'strict'\. Did you mean 'strict_mode'\?"),
        ({"zzz": 1}, r"^partition_config: unknown field 'zzz'\. Fields: layer_specs, use_default_specs, strict_mode"),
        ({"layer_specs": "a"}, r"^layer_specs: a list of rules belongs here, not 'a'"),
        ({"layer_specs": {"patterns": ["a"]}}, r"^layer_specs: a list of rules belongs here"),
        ({"layer_specs": 3}, r"^layer_specs: a list of rules belongs here, not 3"),
        ({"layer_specs": ["a"]}, r"^layer_specs: 'a' is not a mapping"),
        ({"use_default_specs": "no"}, r"^use_default_specs: 'no' is not true or false"),
        ({"strict_mode": 1}, r"^strict_mode: 1 is not true or false"),
    ],
)
def test_bad_set_of_rules_is_refused_by_the_name_of_its_field(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoTPConfig.from_dict(given)


@pytest.mark.parametrize("given", ["rules.json", [{"patterns": ["a"]}], 3])
def test_set_of_rules_that_is_no_mapping_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"^partition_config: .* is not a mapping"):
        AutoTPConfig.from_dict(given)


@pytest.mark.parametrize("name", ["tp_size", "embedding_partition_dim", "lm_head_patterns"])
def test_field_of_deepspeed_without_meaning_warns_once(name: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = AutoTPConfig.from_dict({"layer_specs": [{"patterns": ["a"]}], name: 1})
    assert config == AutoTPConfig([TPLayerSpec(["a"])])
    assert [bool(re.search(f"`{name}` has no effect", str(w.message))) for w in caught] == [True]


def test_every_field_of_deepspeed_without_meaning_has_its_own_warning() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        AutoTPConfig.from_dict({"tp_size": 2, "embedding_partition_dim": 0, "lm_head_patterns": []})
    assert len({str(w.message) for w in caught}) == len(caught) == 3


def test_merge_puts_the_rules_of_override_first() -> None:
    base, override = AutoTPConfig([spec("a"), spec("b")]), AutoTPConfig([spec("b", partition_type="row"), spec("c")])
    merged = merge_autotp_configs(base, override)
    assert merged.layer_specs == [*override.layer_specs, *base.layer_specs]
    assert len(base.layer_specs) == len(override.layer_specs) == 2


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("override", [False, True])
def test_merge_keeps_strict_mode_of_either_and_default_specs_of_override(base: bool, override: bool) -> None:
    merged = merge_autotp_configs(
        AutoTPConfig(strict_mode=base, use_default_specs=base),
        AutoTPConfig(strict_mode=override, use_default_specs=override),
    )
    assert merged.strict_mode == (base or override)
    assert merged.use_default_specs == override


def test_merge_result_does_not_share_its_list() -> None:
    base = AutoTPConfig([spec("a")])
    merge_autotp_configs(base, AutoTPConfig()).layer_specs.append(spec("b"))
    assert base.layer_specs == [spec("a")]
