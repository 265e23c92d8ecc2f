"""Mistakes planted in the kernels are found: the oracle, the sanitizer or the emulator reports each."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from cases import Case, build
from comparison import check, variant
from compilation import CSRC, kernels_library
from emulator import DESCENDING, KernelError, Kernels
from launches import Settings, run


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A mistake: `old`, which stands once in `file`, becomes `new`; seen in the launches of `source` by `cases`."""

    name: str
    file: str
    old: str
    new: str
    source: str
    cases: Sequence[Case]
    error: type[Exception]
    message: str = ""
    settings: Sequence[Settings] = (Settings(),)


FORWARD, BACKWARD = "launch_cross_entropy_forward.cu", "launch_cross_entropy_backward.cu"
REGISTER_ROWS = Case("", "", (5, 40), reduction="none")
BLOCK_ROWS = Case("", "", (5, 301), reduction="none")
BLOCKS_THAT_WALK = [Settings(most_blocks=1), Settings(order=DESCENDING, most_blocks=1)]

MUTATIONS = [
    Mutation("no barrier before shared memory is read", "row_state.cuh",
             "__syncthreads();  // the states of all warps are there", "",
             FORWARD, [BLOCK_ROWS], AssertionError, "output"),
    Mutation("no barrier before shared memory is written again", "row_state.cuh",
             "__syncthreads();  // the scratch may still be read for the row before", "",
             FORWARD, [BLOCK_ROWS], AssertionError, "output", BLOCKS_THAT_WALK),
    Mutation("a shuffle too few", "row_state.cuh",
             "offset > 0; offset /= 2) {", "offset > 1; offset /= 2) {",
             FORWARD, [REGISTER_ROWS], AssertionError, "output"),
    Mutation("an element past the end", "elements.cuh",
             "c = tail + t; c < classes;", "c = tail + t; c <= classes;",
             FORWARD, [BLOCK_ROWS], AssertionError, "output"),
    Mutation("vectors that are not aligned", "elements.cuh",
             "head = elements_to_alignment(row, classes)", "head = 0",
             FORWARD, [BLOCK_ROWS], KernelError, "undefined behaviour .*misaligned address"),
    Mutation("a gradient taken to be as aligned as its logits", "cross_entropy_backward.cuh",
             "if (aligned) {", "if (true) {",
             BACKWARD, [BLOCK_ROWS], KernelError, "undefined behaviour .*misaligned address",
             [Settings(shifts=(0, 1))]),
    Mutation("ignore_index ignored", "targets.cuh",
             "const bool ignored = y.index == t.ignore_index;", "const bool ignored = false;",
             FORWARD, [Case("", "", (5, 40), ignored="some", reduction="none")], AssertionError, "output"),
    Mutation("threads that leave before a shuffle", "cross_entropy_forward.cuh",
             "const bool exists = row < rows;", "const bool exists = row < rows; if (!exists) return;",
             FORWARD, [Case("", "", (5, 10), reduction="none")], KernelError, "deadlock .* wait in __shfl_xor_sync"),
    Mutation("threads beyond a plane", "cross_entropy_backward.cuh",
             "if (inner >= p.extent.inner) continue;", "",
             BACKWARD, [Case("", "", (1, 9, 27), reduction="none")], KernelError, "segmentation fault"),
]  # fmt: skip


def _check(kernels: Kernels, mutation: Mutation) -> None:
    for case in map(variant, mutation.cases):
        for settings in mutation.settings:
            check(case, run(kernels, build(case), settings))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_found(mutation: Mutation, kernels: Kernels, tmp_path: Path) -> None:
    _check(kernels, mutation)  # the comparison passes without the mistake
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    file = csrc / "cuda" / mutation.file
    text = file.read_text()
    assert text.count(mutation.old) == 1, f"{mutation.file} has changed: give this mutation another place"
    file.write_text(text.replace(mutation.old, mutation.new))
    mutated = Kernels(kernels_library(mutation.source, csrc))
    with pytest.raises(mutation.error, match=re.compile(mutation.message, re.DOTALL)):
        _check(mutated, mutation)
