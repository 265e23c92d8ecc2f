"""Models of Hugging Face transformers, built from small configurations, and its Trainer, on nllx by nllx.patched()."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from training import assert_trains_alike, train

import nllx

transformers = pytest.importorskip("transformers")

_VOCABULARY, _STEPS = 211, 4


def _tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(3, _VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def _padded(labels: Tensor) -> Tensor:
    """-100, which the models ignore, behind the first tokens of each sequence."""
    lengths = torch.arange(labels.shape[0])[:, None] * 3 + 5
    return labels.masked_fill(torch.arange(labels.shape[1]) >= lengths, -100)


def _image(seed: int) -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def _gpt2() -> torch.nn.Module:
    config = transformers.GPT2Config(vocab_size=_VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def _llama() -> torch.nn.Module:
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=_VOCABULARY, **size, **heads))


def _bert() -> torch.nn.Module:
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=_VOCABULARY, num_labels=9, max_position_embeddings=32, **size)
    return transformers.BertForTokenClassification(config)


def _t5() -> torch.nn.Module:
    size = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(vocab_size=_VOCABULARY, decoder_start_token_id=0, **size)
    return transformers.T5ForConditionalGeneration(config)


def _vit() -> torch.nn.Module:
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=10, **size)
    return transformers.ViTForImageClassification(config)


def _segformer() -> torch.nn.Module:
    config = transformers.SegformerConfig(
        num_labels=21,
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 24, 32],
        decoder_hidden_size=16,
        num_attention_heads=[1, 2, 2, 2],
    )
    return transformers.SegformerForSemanticSegmentation(config)


def _language(seed: int) -> dict[str, Tensor]:
    tokens = _tokens(seed, 3, 16)
    return {"input_ids": tokens, "labels": _padded(tokens)}


def _named(seed: int) -> dict[str, Tensor]:
    return {"input_ids": _tokens(seed, 3, 16), "labels": _padded(_tokens(seed + 100, 3, 16) % 9)}


def _translation(seed: int) -> dict[str, Tensor]:
    return {"input_ids": _tokens(seed, 3, 12), "labels": _padded(_tokens(seed + 100, 3, 16))}


def _pictures(seed: int) -> dict[str, Tensor]:
    return {"pixel_values": _image(seed), "labels": _tokens(seed, 3) % 10}


def _maps(seed: int) -> dict[str, Tensor]:
    labels = _tokens(seed, 3, 32, 32) % 21
    labels[:, :4] = 255  # what SegFormer ignores
    return {"pixel_values": _image(seed), "labels": labels}


_MODELS: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[int], dict[str, Tensor]]]] = {
    "GPT-2": (_gpt2, _language),
    "Llama": (_llama, _language),
    "BERT, token classification": (_bert, _named),
    "T5": (_t5, _translation),
    "ViT": (_vit, _pictures),
    "SegFormer": (_segformer, _maps),
}


def _loss(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


@pytest.mark.parametrize("name", _MODELS)
def test_model_trains_alike(name: str) -> None:
    build, batch = _MODELS[name]
    assert_trains_alike(build, _loss, [batch(seed) for seed in range(_STEPS)])


@pytest.mark.parametrize("name", ["Llama", "SegFormer"])
def test_model_in_bfloat16(name: str) -> None:
    """Autocast: the loss gets bfloat16 logits, or float32 ones that the model made of them."""
    build, batch = _MODELS[name]

    def loss(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return _loss(model, batch)

    def sharp() -> torch.nn.Module:
        """Logits far from zero: the loss of an untrained model is log C whatever its logits are."""
        model = build()
        head = model.lm_head if name == "Llama" else model.decode_head.classifier
        with torch.no_grad():
            head.weight *= 30
        return model

    batches = [batch(seed) for seed in range(_STEPS)]
    torchs = train(sharp, loss, batches, patched=False, rate=0.0)
    nllxs = train(sharp, loss, batches, patched=True, rate=0.0)
    assert nllxs.calls["cross_entropy"] == {"nllx": _STEPS + 1}
    expected = torch.stack(torchs.losses).float()
    assert (expected - math.log(_VOCABULARY if name == "Llama" else 21)).abs().min() > 0.5
    # 8 bits of the logits, whose rounding both share, and of what the two round themselves.
    assert_close(torch.stack(nllxs.losses).float(), expected, rtol=4e-3, atol=0)
    for ours, theirs in zip(nllxs.gradients, torchs.gradients, strict=True):
        a, b = (torch.cat([value.flatten() for value in gradients.values()]) for gradients in (ours, theirs))
        assert (a - b).norm() < 0.03 * b.norm()


def test_compiled_model_trains_alike() -> None:
    """torch.compile of a patched model: its graph holds nllx's operator."""
    batches = [_language(seed) for seed in range(2)]
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    def losses(compiled: bool) -> Tensor:
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = _gpt2().eval()
        run = torch.compile(model, backend=backend) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        result = []
        for batch in batches:
            value = run(**batch).loss
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            result.append(value.detach())
        return torch.stack(result)

    expected = losses(compiled=False)
    with nllx.patched():
        actual = losses(compiled=True)
    torch._dynamo.reset()
    assert any("nllx" in graph for graph in graphs)
    assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer_trains_alike(smoothing: float, tmp_path: Path) -> None:
    """Padding, gradients accumulated over two batches, and the Trainer's own label smoothing, which calls log_softmax."""
    pytest.importorskip("accelerate")
    dataset = [{key: value[0] for key, value in _language(seed).items()} for seed in range(24)]

    def run(context: Any) -> tuple[list[float], list[Tensor]]:
        transformers.set_seed(0)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_steps=4,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            optim="sgd",
            max_grad_norm=0.0,  # clipping would hide gradients of another scale
            label_smoothing_factor=smoothing,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model=_gpt2(), args=arguments, train_dataset=dataset)
        with context:
            trainer.train()
        parameters = [p.detach().clone() for p in trainer.model.parameters()]
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], parameters

    expected = run(contextlib.nullcontext())
    nllx.patch_report(reset=True)
    actual = run(nllx.patched())
    calls = nllx.patch_report(reset=True)["log_softmax" if smoothing else "cross_entropy"]
    assert calls.keys() == {"nllx"}
    assert calls["nllx"] >= 8  # four steps of two batches
    assert len(expected[0]) == 4
    assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-4)  # logged with four digits
    for a, b in zip(actual[1], expected[1], strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-6)
