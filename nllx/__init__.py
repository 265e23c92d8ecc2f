"""Fused losses for PyTorch, on CPU and CUDA: log-softmax and negative log likelihood, and others.

Drop-in replacements for :class:`torch.nn.CrossEntropyLoss`, :class:`torch.nn.NLLLoss`, :class:`torch.nn.LogSoftmax` and
:class:`torch.nn.MSELoss`.
"""

from nllx._library import load as _load

_load()

from nllx import functional  # noqa: E402  (needs the operators that _load registers)
from nllx._errors import check_errors  # noqa: E402
from nllx.debugging import set_debug  # noqa: E402
from nllx.modules import CrossEntropyLoss, LogSoftmax, MSELoss, NLLLoss  # noqa: E402
from nllx.patching import convert, patch, patch_report, patched, revert, unpatch  # noqa: E402
from nllx.version import __version__  # noqa: E402

__all__ = [
    "CrossEntropyLoss",
    "LogSoftmax",
    "MSELoss",
    "NLLLoss",
    "__version__",
    "check_errors",
    "convert",
    "functional",
    "patch",
    "patch_report",
    "patched",
    "revert",
    "set_debug",
    "unpatch",
]
