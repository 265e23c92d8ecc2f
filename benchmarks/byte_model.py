"""The bytes that an op has to move, whoever computes it, and the least time that takes.

Counted is what no implementation of a separate forward and backward can avoid: each input is read once and each output
is written once per pass. What an implementation saves between the passes (a log-sum-exp per row) is its own affair and
is not counted, nor is a scalar loss.
"""

from __future__ import annotations

from dataclasses import dataclass

from .shapes import Case

INDEX_BYTES = 8  # int64 class indices


@dataclass(frozen=True)
class Speeds:
    """Memory speeds in bytes per second: of reading alone, and of reading and writing as much, both counted."""

    read: float
    read_write: float


@dataclass(frozen=True)
class Traffic:
    """Bytes read and bytes written."""

    read: int
    written: int

    @property
    def total(self) -> int:
        return self.read + self.written

    def floor_seconds(self, speeds: Speeds) -> float:
        """Least time in seconds of one pass: what is written, along with as many bytes read, at the read-and-write
        speed; what is read beyond that at the read speed."""
        paired = min(self.read, self.written)
        return (paired + self.written) / speeds.read_write + (self.read - paired) / speeds.read


def passes(case: Case, element_bytes: int, mode: str) -> list[Traffic]:
    """The traffic of each pass of ``mode``, one of ``calls.MODES``."""
    logits = case.elements * element_bytes
    targets = logits if case.probabilities else case.rows * INDEX_BYTES
    weights = case.classes * element_bytes if case.weight else 0
    match case.op:
        case (
            "cross_entropy" | "cross_entropy_with_options" | "softmax_statistics"
        ):  # numbers of the rows are not counted
            inputs = logits + targets + weights
            forward, backward = Traffic(inputs, 0), Traffic(inputs, logits)
        case "nll_loss":  # the forward needs one element of each row, the backward none of them
            forward = Traffic(case.rows * element_bytes + targets + weights, 0)
            backward = Traffic(targets + weights, logits)
        case "mse_loss":  # of two tensors of the logits' size; the gradient of one
            forward, backward = Traffic(2 * logits, 0), Traffic(2 * logits, logits)
        case "log_softmax":  # the backward reads the output and its gradient
            forward, backward = Traffic(logits, logits), Traffic(2 * logits, logits)
    match mode:
        case "forward":
            return [forward]
        case "backward":
            return [backward]
        case "forward+backward":
            return [forward, backward]
        case "value_and_grad":  # of cross_entropy alone: the inputs are read once for both
            return [Traffic(forward.read, backward.written)]
    raise ValueError(f"no such mode: {mode}")
