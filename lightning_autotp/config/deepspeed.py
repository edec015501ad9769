"""What of a DeepSpeed config is ours, and what its fields mean here."""

from collections.abc import Collection, Mapping
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_warn

from lightning_autotp.config.switches import check_switch
from lightning_autotp.specs.layer_spec import nearest

IGNORED = {
    "tp_grain_size": "sizes that do not divide are cut unevenly by themselves",
    "injection_policy_tuple": "rules go into `partition_config`",
    "keep_module_on_host": "each rank moves only its own part to the device",
    "replace_with_kernel_inject": "it concerns inference kernels",
    "kernel_inject": "it concerns inference kernels",
}
"""Fields of its ``tensor_parallel`` section that have no effect here, and why."""

HEAD, BACKEND = "vocab_parallel_lm_head", "vocab_parallel_ce_backend"

_TOP_LEVEL = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "steps_per_print",
    "wall_clock_breakdown",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
}
"""Keys by which a DeepSpeed config is known."""


def section_of(document: Any, where: str, ours: Collection[str], nested: Collection[str]) -> dict[str, Any]:
    """The fields of ours in a document: its ``tensor_parallel`` section if it is a DeepSpeed config, else all of it.

    ``tensor_parallel`` names both DeepSpeed's section and a field of ``ours`` that has the fields ``nested``; what
    stands in it, and beside it, tells them apart.

    Raises:
        ValueError: with ``where`` the document is from.
    """
    if not isinstance(document, Mapping):
        raise ValueError(f"config: {where!r} holds {type(document).__name__}, not a mapping of fields.")
    section = document.get("tensor_parallel")
    theirs = sorted(_TOP_LEVEL & document.keys())
    if isinstance(document.get("compile"), Mapping):  # ours is true or false
        theirs.append("compile")
    beside = sorted((set(ours) - {"tensor_parallel", *theirs}) & document.keys())
    if not theirs and not _is_section(section, ours, {*nested, "tp_grain_size"}, alone=not beside):
        known = {*ours, HEAD, BACKEND} & document.keys()
        if document and not known and not any(nearest(str(name), ours) for name in document):
            raise ValueError(
                f"config: {where!r} has {', '.join(map(repr, document))}, but neither a `tensor_parallel` section nor"
                f" any of the fields {', '.join(sorted(ours))}."
            )
        return dict(document)
    if beside:
        raise ValueError(
            f"config: {where!r} is a DeepSpeed config, which says everything about tensor parallelism in its"
            f" `tensor_parallel` section; move {', '.join(map(repr, beside))} into it."
        )
    if not isinstance(section, Mapping):
        found = f"is {section!r}, not a mapping of fields" if "tensor_parallel" in document else "is missing"
        raise ValueError(
            f"config: {where!r} is a DeepSpeed config (it has {', '.join(map(repr, theirs))}), and its"
            f' `tensor_parallel` section {found}; give it one, such as {{"autotp_size": 4}}.'
        )
    ours_alone = {"tensor_parallel": section} if section and set(section) <= set(nested) else dict(section)
    return _with_zero(ours_alone, document)


def _with_zero(section: dict[str, Any], document: Mapping[str, Any]) -> dict[str, Any]:
    """``section`` with the stage that the config's ``zero_optimization`` says, unless it says one itself."""
    zero = document.get("zero_optimization")
    if not isinstance(zero, Mapping):
        return section
    for name in ("offload_optimizer", "offload_param"):
        if isinstance(zero.get(name), Mapping) and zero[name].get("device", "none") != "none":
            rank_zero_warn(f"`zero_optimization.{name}` has no effect here: nothing is offloaded.")
    stage = zero.get("stage", 0)
    return {"zero_stage": stage, **section} if stage else section


def _is_section(section: Any, ours: Collection[str], nested: Collection[str], alone: bool) -> bool:
    if not isinstance(section, Mapping):
        return False
    return not set(section) <= set(nested) if alone and section else alone or bool(set(section) & set(ours))


def with_loss_parallel(data: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` with ``loss_parallel`` in the place of DeepSpeed's fields that mean it.

    ``vocab_parallel_lm_head`` is the switch; ``vocab_parallel_ce_backend`` picks the kernels of its loss, which are
    picked by themselves here.

    Raises:
        ValueError: if they contradict ``loss_parallel``, or have values that DeepSpeed does not know.
    """
    kept = {name: value for name, value in data.items() if name not in (HEAD, BACKEND)}
    ours = data.get("loss_parallel")
    if BACKEND in data:
        if data[BACKEND] not in ("torch", "liger"):
            raise ValueError(f"{BACKEND}: {data[BACKEND]!r} is neither 'torch' nor 'liger'; leave it out.")
        if data[BACKEND] == "liger" and ours is False:
            raise ValueError(f"{BACKEND} {data[BACKEND]!r} contradicts loss_parallel False; leave one of them out.")
        rank_zero_warn(f"`{BACKEND}` has no effect here: kernels of the loss are picked by themselves.")
    if HEAD in data:
        check_switch(HEAD, data[HEAD])
        if ours is not None and data[HEAD] != bool(ours):
            raise ValueError(f"{HEAD} {data[HEAD]} contradicts loss_parallel {ours!r}; leave one of them out.")
        kept.setdefault("loss_parallel", data[HEAD])
    return kept
