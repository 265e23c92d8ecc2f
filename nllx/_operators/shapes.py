"""Shapes, dtypes and devices: which fit, from symbolic sizes and without data, for fakes and definitions.

They are checked as the kernels check them, since torch.compile and torch.export see these errors first; values, which the
kernels check, cannot be.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

HALF = (torch.bfloat16, torch.float16)
FLOATING = (torch.float32, torch.float64, *HALF)  # what has kernels
_WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # which torch has hardly an operation for
INDICES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, *_WIDE_UNSIGNED)
NONE, MEAN, SUM, MEAN_OR_ZERO = range(4)  # the operators' reductions
_SCALAR_TYPES = {
    torch.float32: "Float",
    torch.float64: "Double",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.int16: "Short",
    torch.int8: "Char",
    torch.uint8: "Byte",
    torch.uint16: "UInt16",
    torch.uint32: "UInt32",
    torch.uint64: "UInt64",
    torch.bool: "Bool",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
}


def holds(condition: bool | torch.SymBool) -> bool:
    """Whether a comparison of sizes is known to hold. One that depends on data, which a compiler has not, is not known: a guard
    on it would be an error. The kernels compare again, and have the data."""
    return guard_or_false(condition) if isinstance(condition, torch.SymBool) else bool(condition)


def differ(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two shapes are known to differ."""
    return len(a) != len(b) or any(holds(m != n) for m, n in zip(a, b, strict=True))


def class_dim(input: Tensor) -> int:
    """The dimension of the classes: 0 of (C), 1 of (N, C, d1, ..., dk)."""
    return 0 if input.dim() == 1 else 1


def is_probabilities(input: Tensor, target: Tensor) -> bool:
    """Whether the target of a cross entropy holds class probabilities: it has the shape of the logits."""
    if input.dim() == 1 and not target.is_floating_point():  # or one index, of shape (1)
        return target.dim() == 1 and holds(input.shape[0] == target.shape[0])
    return not differ(input.shape, target.shape)


def is_counted(target: Tensor, ignore_index: int) -> Tensor:
    """Which rows are not ignored. As int64: torch takes a number that lies outside of a dtype for what is left of it there,
    so that -100 would be class 156 of uint8."""
    return target.long() != ignore_index


def row_shape(input: Tensor) -> list[int]:
    """The shape of an unreduced loss: that of the input without its classes."""
    shape = list(input.shape)
    shape.pop(class_dim(input))
    return shape


def check_arguments(
    op: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float = 0.0,
) -> bool:
    """Raises what the kernels raise for shapes, dtypes, options and devices that do not fit, in their order (csrc/checks.cpp).

    Returns whether the target holds class probabilities.
    """
    takes_probabilities = op == "cross_entropy"
    name = "logits" if takes_probabilities else "log_probs"
    probabilities = takes_probabilities and is_probabilities(input, target)
    if probabilities:
        torch._check(
            target.is_floating_point(),
            lambda: (
                f"{op}: Expected floating point type for target with class probabilities, got {dtype_name(target.dtype)}; for "
                f"one-hot targets call target.argmax({class_dim(input)}) or target.to({name}.dtype)"
            ),
        )
    if input.dim() == 0:
        if takes_probabilities:
            raise IndexError(f"{op}: Dimension out of range: {name} has no dimension")
        raise ValueError(f"{op}: Expected 1 or more dimensions (got 0) in {name}")
    check_dtype(op, input.dtype)
    if not probabilities:
        _check_index_target(op, name, input, target)
    torch._check(
        probabilities or target.dtype != torch.uint64 or ignore_index != 2**63 - 1,
        lambda: (
            f"{op}: ignore_index {ignore_index} cannot be told from larger indices in a target of dtype UInt64; take "
            "another one"
        ),
    )
    if reduction not in (NONE, MEAN, SUM, MEAN_OR_ZERO):
        raise ValueError(f"{op}: {reduction} is not a valid value for reduction")
    torch._check(
        0.0 <= label_smoothing <= 1.0,
        lambda: f"{op}: label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}",
    )
    if probabilities:
        torch._check(
            ignore_index < 0,
            lambda: (
                f"{op}: ignore_index is not supported for floating point target, got ignore_index={ignore_index}; give the "
                "rows to ignore zero probabilities instead"
            ),
        )
    if weight is not None:
        _check_weight(op, name, input, weight, probabilities)
    check_devices(op, input, target=target, weight=weight)
    return probabilities


def check_dtype(op: str, dtype: torch.dtype) -> None:
    """Raises for a dtype that has no kernel."""
    if dtype not in FLOATING:
        raise NotImplementedError(f"\"{op}\" not implemented for '{dtype_name(dtype)}'")


def dtype_name(dtype: torch.dtype) -> str:
    """The name that messages from C++ have: Float for float32."""
    return _SCALAR_TYPES.get(dtype) or str(dtype).removeprefix("torch.")


def _check_index_target(op: str, name: str, input: Tensor, target: Tensor) -> None:
    if input.dim() > 1 and target.dtype in INDICES and not differ(target.shape, row_shape(input)):
        return  # at once, since torch.func comes here for every call
    if input.dim() == 1:
        if target.dim() == 1:
            torch._check_value(
                not holds(target.shape[0] != 1),
                lambda: f"{op}: For 1D input, 1D target must have size 1, got {target.shape[0]}",
            )
        torch._check(target.dim() <= 1, lambda: f"{op}: 0D or 1D target tensor expected, multi-target not supported")
    else:
        batch = target.shape[0] if target.dim() else 0
        torch._check_value(
            not holds(input.shape[0] != batch),
            lambda: f"{op}: Expected input batch_size ({input.shape[0]}) to match target batch_size ({batch}).",
        )
        if input.dim() == 2:
            torch._check(
                target.dim() == 1,
                lambda: (
                    f"{op}: 0D or 1D target tensor expected, multi-target not supported; {name} has shape "
                    f"{list(input.shape)}, target has shape {list(target.shape)}"
                ),
            )
        if input.dim() == 4:
            torch._check(
                target.dim() == 3,
                lambda: (
                    f"{op}: only batches of spatial targets supported (3D tensors) but got targets of dimension: "
                    f"{target.dim()}. {name} has shape {list(input.shape)}, expected target size {row_shape(input)}"
                ),
            )
        expected = row_shape(input)
        torch._check(
            not differ(target.shape, expected),
            lambda: (
                f"{op}: size mismatch (got input: {list(input.shape)} , target: {list(target.shape)}). "
                f"Expected target size {expected}, got {list(target.shape)}"
            ),
        )
    torch._check(
        target.dtype in INDICES,
        lambda: (
            f"{op}: expected target dtype to be Long or Byte (or another integer, or Bool), but got "
            f"{dtype_name(target.dtype)}: target has dtype "
            f"{dtype_name(target.dtype)} and the shape of class indices; call target.long()"
        ),
    )


def _check_weight(op: str, name: str, input: Tensor, weight: Tensor, probabilities: bool) -> None:
    classes = input.shape[class_dim(input)]
    any_shape = input.dim() > 2 and not probabilities  # torch counts the elements of such a loss alone
    torch._check(
        (any_shape or weight.dim() == 1) and not holds(weight.numel() != classes),
        lambda: (
            f"{op}: weight tensor should be defined either for all {classes} classes or no classes but got weight tensor of "
            f"shape: {list(weight.shape)}"
        ),
    )
    if probabilities:
        if weight.is_complex():
            raise NotImplementedError(
                f"{op}: weight must be real, but has dtype {dtype_name(weight.dtype)}; a complex loss has no gradient to "
                "descend"
            )
        return
    takes = weight.dtype == input.dtype or (input.dtype in HALF and weight.dtype in (torch.float32, torch.float64))
    torch._check(
        takes,
        lambda: (
            f"{op}: expected scalar type {dtype_name(input.dtype)} but found {dtype_name(weight.dtype)} for weight; call "
            f"weight.to({name}.dtype)"
        ),
    )


def check_devices(op: str, input: Tensor, **others: Tensor | None) -> None:
    """Raises where one of the other tensors is not on the device of the input."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(
                f"{op}: Expected all tensors to be on the same device, but found at least two devices, {input.device} and "
                f"{tensor.device} ({name})"
            )


def loss_dtypes(
    input: Tensor, target: Tensor, weight: Tensor | None, probabilities: bool, dtype: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of the loss and of the arithmetic (csrc/loss_problem.cpp)."""
    loss = input.dtype
    if probabilities:
        loss = torch.promote_types(loss, target.dtype)
        if weight is not None:
            loss = torch.promote_types(loss, weight.dtype)
    return dtype or loss, torch.float64 if loss == torch.float64 else torch.float32
