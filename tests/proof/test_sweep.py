"""Plans as they are made for model types of transformers: right ones are proved, wrong ones refuted or made right."""

from __future__ import annotations

import pytest
import torch

from lightning_autotp.model_sources.hf import causal_types
from lightning_autotp.model_sources.small import SWEEP
from tests.helpers.hf_trials import proof_batch, trial_of, truth_of
from tests.helpers.truth import FALSE, Kind, counted, judged, of, proof_of, proved

SMALL = ["llama", "gpt_oss", "qwen3_next", "deepseek_v3", "mixtral", "bert", "vit", "gemma3_text", "bart", "codegen"]


def judge(name: str, size: int) -> tuple[str, Kind | None]:
    """The verdict on a type's plan; None if there is no small model, or its plan is refused."""
    try:
        trial = trial_of(name, size)
    except ValueError as error:
        return f"{name}: {error}", None
    if trial.plan.blockers:
        return f"{name}: {trial.plan.blockers[0]}", None
    want = truth_of(name)
    proof = proof_of(trial, proof_batch(name))
    return f"{name} at TP={size}: {proof.verdict} {proof.repairs or ''}", judged(trial, want, proof)


def check(names: list[str], size: int, unknown: int) -> None:
    found = [judge(name, size) for name in names]
    for said, kind in found:
        if kind is None or kind.startswith("wrong") or kind == "right, repaired":
            print(f"{kind or 'not tried'}: {said}")
    counts = counted((said, kind) for said, kind in found if kind is not None)
    assert not any(counts[kind] for kind in FALSE)
    assert proved(counts) >= of(counts, "right") - unknown
    assert counts["wrong, refuted"] + counts["wrong, made right"] == of(counts, "wrong")
    assert of(counts, "right") >= 0.9 * len(names)


def test_some_types() -> None:
    torch.set_num_threads(1)
    check(SMALL, 2, 0)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("size", "unknown"), [(2, 0), (4, 2)])
def test_all_types(size: int, unknown: int) -> None:
    check(list(dict.fromkeys([*causal_types(), *SWEEP])), size, unknown)
