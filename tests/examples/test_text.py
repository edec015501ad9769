"""The text example on one process: its windows, its errors, that it learns, and that it writes the same text twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor

from lightning_autotp.examples.corpus import python_prose, read_text
from lightning_autotp.examples.text import ByteLlama, SampleText, TextBytes

SEQ, BATCH = 32, 4
SENTENCE = b"The quick brown fox jumps over the lazy dog. "
TEXT = SENTENCE * 200


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return path


def tiny_model(**kwargs: int | float | bool) -> ByteLlama:
    sizes = {"hidden_size": 32, "num_layers": 1, "intermediate_size": 64, "context_length": SEQ, "warmup_steps": 2}
    return ByteLlama(**{**sizes, **kwargs})  # type: ignore[arg-type]


def tiny_data(path: Path) -> TextBytes:
    return TextBytes(path=str(path), seq_length=SEQ, batch_size=BATCH)


def tiny_trainer(tmp_path: Path, **kwargs: object) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"accelerator": "cpu", "enable_checkpointing": False, "default_root_dir": tmp_path, **quiet, **kwargs}
    return Trainer(**options)  # type: ignore[arg-type]


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        self.seen.append(float(trainer.callback_metrics["train_loss"]))


def fit(tmp_path: Path, path: Path, steps: int, *callbacks: Callback) -> ByteLlama:
    seed_everything(0, verbose=False)
    model = tiny_model(learning_rate=1e-2)
    tiny_trainer(tmp_path, max_steps=steps, callbacks=list(callbacks)).fit(model, tiny_data(path))
    return model


# ---- the text


def test_default_text_is_large_and_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = python_prose()
    assert len(text) > 1_000_000
    made = iter([text])  # a second time raises StopIteration
    monkeypatch.setattr("lightning_autotp.examples.text.python_prose", lambda: next(made))
    for _ in range(2):
        data = TextBytes(cache_dir=str(tmp_path / "cache"))
        data.prepare_data()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [data.path.name]
    assert read_text(data.path).decode() == text
    data.setup()
    assert len(data.train) * data.seq_length > 0.85 * len(text)


def test_a_folder_is_read_in_the_order_of_paths_without_binaries(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.md").write_bytes(b"first")
    (tmp_path / "c.bin").write_bytes(b"\0\1\2")
    assert read_text(tmp_path) == b"first\n\nsecond"


def test_a_path_without_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'.*nowhere' does not exist"):
        tiny_data(tmp_path / "nowhere").setup()
    with pytest.raises(FileNotFoundError, match="there is no text file in the folder"):
        tiny_data(tmp_path).setup()


def test_too_little_text_is_an_error_that_counts(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(b"a" * (SEQ * (BATCH + 1)))
    with pytest.raises(ValueError, match=r"holds 160 bytes, which is 5 windows of seq_length=32; .* batch of 4"):
        tiny_data(path).setup()
    path.write_bytes(b"a" * (SEQ * (BATCH + 2)))
    tiny_data(path).setup()


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_val_fraction_out_of_range_is_an_error(fraction: float) -> None:
    with pytest.raises(ValueError, match="val_fraction"):
        TextBytes(val_fraction=fraction)


# ---- the windows


def test_windows_tile_the_text_in_order_train_then_val_then_test(text_file: Path) -> None:
    data = tiny_data(text_file)
    data.setup()
    windows = [split[index] for split in (data.train, data.val, data.test) for index in range(len(split))]
    assert windows[0].dtype == torch.long
    assert windows[0].shape == (SEQ,)
    text = b"".join(bytes(window.tolist()) for window in windows)
    assert text == TEXT[: len(text)]
    assert len(TEXT) - len(text) < SEQ
    assert len(data.val) == len(data.test) == len(windows) // 20


def test_training_batches_are_shuffled_by_the_seed_and_others_are_not(text_file: Path) -> None:
    data = tiny_data(text_file)
    data.setup()

    def first(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return next(iter(data.train_dataloader()))

    assert first(0).shape == (BATCH, SEQ)
    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))
    assert torch.equal(next(iter(data.val_dataloader()))[0], data.val[0])
    assert torch.equal(next(iter(data.predict_dataloader()))[0], data.test[0])


# ---- the model


def test_a_few_steps_lower_the_loss(tmp_path: Path, text_file: Path) -> None:
    losses = Losses()
    fit(tmp_path, text_file, 5, losses)
    assert len(losses.seen) == 5
    assert 5.2 < losses.seen[0] < 5.9  # ln 256 = 5.55: it begins by knowing nothing
    assert losses.seen[-1] < losses.seen[0] - 0.5


def test_learning_rate_warms_up_then_falls_to_a_tenth(tmp_path: Path, text_file: Path) -> None:
    rates = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit(tmp_path, text_file, 12, Rates())
    assert rates[0] == pytest.approx(5e-3)
    assert rates[1] == rates[2] == pytest.approx(1e-2)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 1e-3 < rates[-1] < 2e-3


def test_validate_test_and_predict(tmp_path: Path, text_file: Path) -> None:
    trainer, model, data = tiny_trainer(tmp_path), tiny_model(), tiny_data(text_file)
    assert trainer.validate(model, data, verbose=False)[0]["val_loss"] == pytest.approx(5.55, abs=0.3)
    assert trainer.test(model, data, verbose=False)[0]["test_loss"] == pytest.approx(5.55, abs=0.3)
    logits = trainer.predict(model, data)
    assert logits is not None
    assert torch.cat(logits).shape == (len(data.test), 256)  # type: ignore[arg-type]


def test_tied_embeddings_are_one_parameter() -> None:
    model = tiny_model(tie_word_embeddings=True)
    model.configure_model()
    assert model.model.lm_head.weight is model.model.model.embed_tokens.weight


def test_configure_model_builds_once() -> None:
    model = tiny_model()
    model.configure_model()
    built = model.model
    model.configure_model()
    assert model.model is built


# ---- the text it writes


def test_generation_is_the_same_for_a_seed_and_leaves_the_mode_alone() -> None:
    model = tiny_model()
    model.configure_model()
    state = torch.get_rng_state()
    text = model.generate(b"The ", 2 * SEQ)
    assert len(text) == 2 * SEQ
    assert model.generate(b"The ", 2 * SEQ) == text
    assert model.generate(b"The ", 2 * SEQ, seed=1) != text
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)  # training's own randomness is untouched


def test_generation_takes_the_likeliest_byte_at_temperature_0_whatever_the_padding() -> None:
    model = tiny_model()
    model.configure_model()
    with torch.no_grad():
        expected = model(torch.tensor([list(b"The ")]))[0, -1].argmax()
    assert model.generate(b"The ", 1, temperature=0) == bytes([int(expected)])


def test_generation_needs_a_prompt() -> None:
    with pytest.raises(ValueError, match="prompt"):
        tiny_model().generate(b"", 1)


def test_sample_is_printed_when_training_ends(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = fit(tmp_path, text_file, 5, SampleText(prompt="The ", num_bytes=20))
    sample = model.generate(b"The ", 20).decode(errors="replace")
    assert f"\nThe {sample}\n" in capsys.readouterr().out
