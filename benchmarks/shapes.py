"""The named cases that are timed, and the inputs that are made for them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Op = Literal["cross_entropy", "nll_loss", "log_softmax", "mse_loss", "softmax_statistics", "cross_entropy_with_options"]
OPS: tuple[Op, ...] = get_args(Op)

# What segmentation data sets (PASCAL VOC, Cityscapes, ADE20K) write where a pixel has no label.
UNLABELLED = 255


@dataclass(frozen=True)
class Case:
    """One timed problem. The class dimension is 1, the reduction is the mean.

    ``per_sample``: each row is a problem of its own, mapped over by ``torch.func.vmap``. ``ignored`` is the share of
    targets equal to ``UNLABELLED``, which is then the ``ignore_index``. ``option``: of ``cross_entropy_with_options``, the
    name of the one that is given. ``quick``: part of a quick run on a CPU. On a GPU
    ``quick_dtypes`` are those of a quick run, which has ``torch.compile`` in the first of them if ``quick_compile``;
    ``launch_bound``: wall time counts, not the GPU's.
    """

    name: str
    origin: str
    shape: tuple[int, ...]
    op: Op = "cross_entropy"
    probabilities: bool = False
    weight: bool = False
    ignored: float = 0.0
    label_smoothing: float = 0.0
    channels_last: bool = False
    per_sample: bool = False
    option: str = ""
    quick: bool = False
    launch_bound: bool = False
    quick_dtypes: tuple[str, ...] = ()
    quick_compile: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def classes(self) -> int:
        return self.shape[1]

    @property
    def rows(self) -> int:
        """Number of positions that are classified."""
        return self.elements // self.classes


def _planes(name: str, origin: str, shape: tuple[int, ...], quick: bool = False) -> list[Case]:
    contiguous = Case(name, origin, shape, weight=True, ignored=0.05, quick=quick)
    return [
        contiguous,
        replace(contiguous, name=f"{name}-channels-last", origin=f"{origin}, channels-last", channels_last=True),
    ]


def _per_sample(origin: str, shape: tuple[int, int]) -> Case:
    return Case(f"samples-{shape[0]}x{shape[1]}", f"loss and gradient of each sample, {origin}", shape, per_sample=True)


def _with_option(option: str, origin: str) -> list[Case]:
    shapes = [(2048, 32000), (65536, 1000)]
    prefix = option.replace("_", "-")
    return [
        Case(f"{prefix}-{rows}x{classes}", origin, (rows, classes), op="cross_entropy_with_options", option=option)
        for rows, classes in shapes
    ]


def _alone(op: Op, origin: str) -> list[Case]:
    shapes = [(32, 10), (4096, 1000), (2048, 32000), (1048576, 10), (8, 21, 512, 512)]
    prefix = op.replace("_loss", "").replace("_", "-")
    return [Case(f"{prefix}-{'x'.join(map(str, shape))}", f"{op} alone, {origin}", shape, op=op) for shape in shapes]


CASES: list[Case] = [
    Case("lm-2048x32000", "one sequence of 2048 tokens, Llama 2 vocabulary", (2048, 32000)),
    Case("lm-512x128256", "512 tokens, Llama 3 vocabulary", (512, 128256)),
    Case("lm-1024x50257", "GPT-2's context and vocabulary; odd rows start unaligned", (1024, 50257), quick=True),
    Case("imagenet-256x1000", "ImageNet-1k, the usual batch; fits the caches", (256, 1000), quick=True),
    Case("imagenet-4096x1000", "ImageNet-1k, large-batch training", (4096, 1000)),
    Case("imagenet21k-1024x21841", "ImageNet-21k, every class", (1024, 21841)),
    Case("rows-65536x10", "CIFAR-10 or digits, a whole data set at once; rows shorter than a vector", (65536, 10)),
    Case("rows-1048576x2", "binary tagging of a million tokens; a row is two elements", (1048576, 2)),
    Case("rows-262144x100", "CIFAR-100 classes, many rows; rows of a few vectors", (262144, 100)),
    Case("tiny-32x10", "a small classifier's step; bound by the overhead of the call", (32, 10), quick=True),
    Case("tiny-64x100", "likewise, with CIFAR-100 classes", (64, 100)),
    Case("tiny-1x1000", "one image at a time; one row cannot be split by rows", (1, 1000)),
    *_planes("planes-8x21x512x512", "PASCAL VOC segmentation, 21 classes", (8, 21, 512, 512), quick=True),
    *_planes("planes-2x19x1024x2048", "Cityscapes at full resolution, 19 classes", (2, 19, 1024, 2048)),
    *_planes("planes-1x150x512x683", "ADE20K, 150 classes; odd width", (1, 150, 512, 683)),
    Case("probabilities-1024x1000", "mixup or distillation on ImageNet-1k", (1024, 1000), probabilities=True),
    Case("probabilities-256x32000", "distillation of a language model", (256, 32000), probabilities=True),
    Case("smoothing-4096x1000", "the usual ImageNet recipe, smoothing 0.1", (4096, 1000), label_smoothing=0.1),
    Case("smoothing-1024x32000", "translation with smoothing 0.1", (1024, 32000), label_smoothing=0.1),
    Case("smoothing-1024x50257", "rows that start unaligned, smoothing 0.1", (1024, 50257), label_smoothing=0.1),
    Case("smoothing-65536x10", "short rows, smoothing 0.1", (65536, 10), label_smoothing=0.1),
    Case("smoothing-32x10", "a small classifier's step, smoothing 0.1", (32, 10), label_smoothing=0.1),
    Case("smoothing-8x21x512x512", "segmentation, smoothing 0.1", (8, 21, 512, 512), label_smoothing=0.1),
    _per_sample("a small classifier's step", (64, 10)),
    _per_sample("10 classes", (4096, 10)),
    _per_sample("ImageNet-1k", (4096, 1000)),
    _per_sample("a Llama 2 vocabulary", (512, 32000)),
    *_alone("nll_loss", "on log-probabilities; one element of a row is read"),
    Case("mse-32x10", "mse_loss alone, a small regression's step", (32, 10), op="mse_loss"),
    Case("mse-4096x1000", "mse_loss alone, fits the caches of few CPUs", (4096, 1000), op="mse_loss"),
    Case("mse-16x3x1024x1024", "mse_loss alone, reconstructed images", (16, 3, 1024, 1024), op="mse_loss"),
    *_alone("log_softmax", "what a model's last layer computes where the loss is NLLLoss"),
    Case("statistics-2048x32000", "log-prob, logsumexp, entropy, prediction", (2048, 32000), op="softmax_statistics"),
    Case("statistics-65536x1000", "log-prob, logsumexp, entropy, prediction", (65536, 1000), op="softmax_statistics"),
    *_with_option("softcap", "logits capped at 30, as Gemma 2 does"),
    *_with_option("temperature", "logits divided by 0.7"),
    *_with_option("logit_scale", "logits times a learnable scale, with its gradient"),
    *_with_option("z_loss", "with a z-loss, as PaLM"),
    *_with_option("sample_weight", "a weight for each row"),
    *_with_option("divisor", "the mean over the rows of other micro-batches too"),
]


LARGE = 1 << 28  # elements: 512 MiB in half precision, 1 GiB in float32


def _large(classes: int, origin: str, name: str = "rows", **options: Any) -> Case:
    """As many rows as make the logits large."""
    rows = -(-LARGE // classes)
    return Case(f"{name}-{rows}x{classes}", origin, (rows, classes), **options)


def _tiny(origin: str, shape: tuple[int, int]) -> Case:
    return Case(f"tiny-{shape[0]}x{shape[1]}", origin, shape, launch_bound=True, quick_dtypes=_HALF)


_HALF = ("bfloat16",)
_BOTH = ("bfloat16", "float32")

# What matters most comes first: a budget of time cuts off the end.
CUDA_CASES: list[Case] = [
    _large(32000, "Llama 2 vocabulary", quick_dtypes=(*_BOTH, "float16"), quick_compile=True),
    _large(1000, "ImageNet-1k classes", quick_dtypes=_BOTH, quick_compile=True),
    _large(128256, "Llama 3 vocabulary", quick_dtypes=_BOTH, quick_compile=True),
    Case("planes-16x21x512x512", "PASCAL VOC segmentation, 21 classes", (16, 21, 512, 512), quick_dtypes=_BOTH),
    Case("planes-4x150x512x512", "ADE20K segmentation, 150 classes", (4, 150, 512, 512), quick_dtypes=_BOTH),
    _large(50257, "GPT-2's vocabulary; odd rows start unaligned", quick_dtypes=_HALF),
    _large(262144, "Gemma's vocabulary", quick_dtypes=_HALF),
    _large(10, "CIFAR-10 classes; rows shorter than a vector", quick_dtypes=_HALF),
    _large(256, "bytes", quick_dtypes=_HALF),
    _large(8192, "a codebook of images or sound", quick_dtypes=_HALF),
    _large(152064, "Qwen 2.5 vocabulary", quick_dtypes=_HALF),
    Case("rows-8x262144", "a step of generation; fewer rows than multiprocessors", (8, 262144), quick_dtypes=_HALF),
    _tiny("a small classifier's step", (32, 10)),
    _tiny("likewise, with CIFAR-100 classes", (64, 100)),
    _tiny("one image at a time", (1, 1000)),
    _large(32000, "translation with smoothing 0.1", "smoothing", label_smoothing=0.1, quick_dtypes=_HALF),
    _large(32000, "distillation of a language model", "probabilities", probabilities=True, quick_dtypes=_BOTH),
    _large(1000, "ImageNet-1k with class weights", "weights", weight=True, quick_dtypes=_HALF),
    *_planes("weighted-planes-16x21x512x512", "PASCAL VOC with weights and unlabelled pixels", (16, 21, 512, 512)),
    _large(32000, "on log-probabilities; one element of a row is read", "nll", op="nll_loss"),
    _large(32000, "what a model's last layer computes where the loss is NLLLoss", "log-softmax", op="log_softmax"),
]


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call ``function(logits, *args, **options)``, followed by ``backward(grad_output)``.

    ``per_sample``: of a call for each index of the first dimension of logits and args, whose samples keep it at size 1.
    """

    logits: Tensor
    args: tuple[Tensor, ...]
    options: dict[str, Any]
    grad_output: Tensor | None
    per_sample: bool = False

    def double(self) -> Inputs:
        """The same values in float64; index targets stay as they are."""

        def convert(value: Any) -> Any:
            return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

        return Inputs(
            convert(self.logits),
            tuple(convert(arg) for arg in self.args),
            {key: convert(value) for key, value in self.options.items()},
            convert(self.grad_output),
            self.per_sample,
        )


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Random normal logits (log-probabilities of such for ``nll_loss``) and random targets, equal in every run."""
    generator = torch.Generator(device).manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(case.shape, generator=generator, device=device)

    def place(tensor: Tensor) -> Tensor:
        layout = torch.channels_last if case.channels_last else torch.contiguous_format
        return tensor.to(dtype).contiguous(memory_format=layout)

    if case.op == "log_softmax":
        return Inputs(place(normal()), (), {"dim": 1}, place(normal()))

    logits = place(normal().log_softmax(1) if case.op == "nll_loss" else normal())
    options: dict[str, Any] = {}
    if case.op == "mse_loss":
        target = place(normal())
    elif case.probabilities:
        target = place(normal().softmax(1))
    else:
        size = (case.shape[0], *case.shape[2:])
        target = torch.randint(case.classes, size, generator=generator, device=device)
        if case.ignored:
            drawn = torch.rand(size, generator=generator, device=device) < case.ignored
            target = target.masked_fill(drawn, UNLABELLED)
            options["ignore_index"] = UNLABELLED
    if case.weight:
        options["weight"] = (torch.rand(case.classes, generator=generator, device=device) + 0.5).to(dtype)
    if case.label_smoothing:
        options["label_smoothing"] = case.label_smoothing
    match case.option:
        case "softcap":
            options["softcap"] = 30.0
        case "temperature":
            options["temperature"] = 0.7
        case "logit_scale":
            options["logit_scale"] = torch.tensor(1.3, device=device, requires_grad=True)
        case "z_loss":
            options["z_loss"] = 1e-4
        case "sample_weight":
            options["sample_weight"] = torch.rand(target.shape, generator=generator, device=device)
        case "divisor":
            options["divisor"] = 4.0 * target.numel()
    return Inputs(logits, (target,), options, None, case.per_sample)
