"""Loads the compiled part, which registers the operators, and adds to them what is written in Python."""

from __future__ import annotations

import importlib.util
import mmap
import os
import re
import struct
import sys
from pathlib import Path

import torch

_REBUILD = (
    "rebuild it against the installed torch: pip install --no-build-isolation --force-reinstall --no-deps <nllx source>"
)
_libraries: list[torch.library.Library] = []  # a registration lasts as long as its Library
_MARK = rb"NLLX_TORCH_VERSION=([0-9A-Za-z.+_-]+)"


def _torch_built_against(binary: str) -> str | None:
    """The torch version that a binary was built against, read from the file without loading it."""
    with open(binary, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = re.search(_MARK, content)
        return found.group(1).decode() if found else None


def _is_cut_off(binary: str) -> bool:
    """Whether an ELF file ends before its table of sections, which is its last part: to load it could end the process."""
    with open(binary, "rb") as file:
        header = file.read(64)
        size = file.seek(0, os.SEEK_END)
    if header[:6] != b"\x7fELF\x02\x01":  # 64 bits, little endian
        return size == 0
    if len(header) < 64:
        return True
    (sections,) = struct.unpack_from("<Q", header, 0x28)
    entry_size, entries = struct.unpack_from("<HH", header, 0x3A)
    return sections + entry_size * entries > size


def _release(version: str) -> list[str]:
    """The part of a torch version within which its C++ interface is stable."""
    return version.split(".")[:2]


def load() -> None:
    """Registers torch.ops.nllx.*, with fake kernels and differentiable definitions.

    Raises:
        ImportError: nllx was not built, or was built against another torch release; the message says how to rebuild.
    """
    spec = importlib.util.find_spec("nllx._C")
    if spec is None or spec.origin is None:
        raise ImportError(
            f"nllx is not built: there is no nllx._C for Python {sys.version_info.major}.{sys.version_info.minor}. Run "
            "`make build` in its source tree, or `pip install --no-build-isolation .`"
            + (
                "; if you have, leave this folder: Python takes the sources here, and not the installed package"
                if (Path(__file__).parent.parent / "csrc").is_dir()
                else ""
            )
        )
    if _is_cut_off(spec.origin):
        raise ImportError(f"nllx's extension {spec.origin} is damaged: it has been cut off; {_REBUILD}")
    built = _torch_built_against(spec.origin)
    if built is None or _release(built) != _release(torch.__version__):
        raise ImportError(
            f"nllx was built against torch {built}, but torch {torch.__version__} is installed; {_REBUILD}"
        )
    try:
        from nllx import _C
    except ImportError as error:
        raise ImportError(
            f"nllx, built against torch {built}, does not load with torch {torch.__version__} ({error}); {_REBUILD}"
        ) from error
    _C.cpu_capability()  # a capability that this CPU cannot run is an error here and not in the middle of a training

    from nllx import _operators

    library = torch.library.Library("nllx", "IMPL")
    _libraries.append(library)
    _operators.register(library)
