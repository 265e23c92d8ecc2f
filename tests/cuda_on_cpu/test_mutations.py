"""Mistakes planted in the kernels are found: the oracle, the sanitizer or the emulator reports each."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from cases import Case, Problem, build
from comparison import check, variant
from compilation import CSRC, kernels_library
from cross_entropy_options import OptionsCase, check_cross_entropy_options
from elementwise import ElementwiseCase, check_mse_loss
from emulator import ASCENDING, DESCENDING, RANDOM, CudaDevice, KernelError, Kernels
from launches import Settings, run
from row_options import Options
from softmax_statistics import StatisticsCase, check_softmax_statistics


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A mistake: `old`, which stands once in `file`, becomes `new`; seen in the launches of `source` by `cases`."""

    name: str
    file: str
    old: str
    new: str
    source: str
    cases: Sequence[
        Case | ElementwiseCase | OptionsCase | StatisticsCase | Problem
    ]  # of a problem nothing but that it runs is looked at
    error: type[Exception] | tuple[type[Exception], ...]
    message: str = ""
    settings: Sequence[Settings] = (Settings(),)
    banks: bool = False  # seen in the cycles that shared memory takes


FORWARD, BACKWARD = "cross_entropy_forward.cu", "cross_entropy_backward.cu"
TILE_ROWS = Case("", "", (300, 10), reduction="mean")
TILES_OF_WORDS = Case("", "", (300, 12), dtype=torch.bfloat16, ignored="some")
REGISTER_ROWS = Case("", "", (5, 40), reduction="none")
BLOCK_ROWS = Case("", "", (5, 1101), reduction="none")
BAD_ROWS = build(variant(Case("", "", (5, 40))))
BAD_ROWS.target.fill_(40)
SPLIT_ROWS = Case("", "", (2, 70_001), reduction="mean")
LOG_SOFTMAX, STATISTICS = "log_softmax.cu", "softmax_statistics.cu"
OPTIONS = "cross_entropy_options.cu"
ALL_OPTIONS = Options(logit_scale="rows", temperature="rows", softcap=3.0, sample_weight=True)
CLUSTER_ROWS = Case("", "", (7, 3001), op="log_softmax")
CLUSTERS_THAT_WALK = [
    Settings(device=CudaDevice(1, 24 << 10, 4), order=order, most_blocks=1) for order in (DESCENDING, RANDOM)
]
BLOCKS_THAT_WALK = [Settings(order=order, most_blocks=1) for order in (ASCENDING, DESCENDING, RANDOM)]
DISORDER = [Settings(order=DESCENDING), Settings(order=RANDOM)]
TOGETHER = [Settings(together=True), Settings(together=True, order=DESCENDING, in_place=True)]

MUTATIONS = [
    Mutation("no barrier before shared memory is read", "row_state.cuh",
             "__syncthreads();  // the states of all warps are there", "",
             FORWARD, [BLOCK_ROWS], AssertionError, "output"),
    Mutation("no barrier before shared memory is written again", "row_state.cuh",
             "__syncthreads();  // the scratch may still be read for the row before", "",
             FORWARD, [variant(BLOCK_ROWS, shape=(5000, 1101))], AssertionError, "", BLOCKS_THAT_WALK),
    Mutation("no barrier before a tile is read", "cross_entropy_rows.cuh",
             "__syncthreads();  // the tile is there, and the one before is used up", "",
             FORWARD, [TILE_ROWS], AssertionError, "output"),
    Mutation("no barrier before the gradient of a tile is stored", "cross_entropy_rows.cuh",
             "__syncthreads();  // the gradient is there", "",
             FORWARD, [TILE_ROWS], AssertionError, "", TOGETHER),
    Mutation("rows of a tile that meet in a bank", "cross_entropy_rows.cuh",
             "return lane * (bytes & -bytes)", "return 0 * lane * (bytes & -bytes)",
             FORWARD, [variant(TILE_ROWS, shape=(300, 8))], AssertionError, "banks", banks=True),
    Mutation("a word of a tile's row taken twice", "cross_entropy_rows.cuh",
             "j / kMeet * kMeet", "j / kMeet * (kMeet - 1)",
             FORWARD, [TILES_OF_WORDS], AssertionError, "output"),
    Mutation("words of rows that begin within one", "cross_entropy_rows.cuh",
             "((past | classes) & 1) == 0", "(classes & 1) == 0",
             FORWARD, [TILES_OF_WORDS], KernelError, "not aligned", [Settings(shifts=(1, 1))]),
    Mutation("a target whose own term is left out", "cross_entropy_rows.cuh",
             "if (gradient.target >= 0) x_[gradient.target] = of_target;", "",
             BACKWARD, [TILES_OF_WORDS], AssertionError, "grad"),
    Mutation("gradients of rows that do not count", "cross_entropy_rows.cuh",
             "gradient.counts ? g : 0u", "g",
             BACKWARD, [variant(TILES_OF_WORDS, ignored="all")], AssertionError, "grad"),
    Mutation("a shuffle too few", "row_state.cuh",
             "if (offset < width) v = merge", "if (2 * offset < width) v = merge",
             FORWARD, [REGISTER_ROWS], AssertionError, "output"),
    Mutation("an element counted twice at the end", "elements.cuh",
             ": last(part.tail + t),", ": last(part.tail + t - 1),",
             FORWARD, [BLOCK_ROWS], AssertionError, "output"),
    Mutation("a vector past the end", "elements.cuh",
             "tail = head + (classes - head) / kSize * kSize;", "tail = head + (classes - head + kSize - 1) / kSize * kSize;",
             FORWARD, [BLOCK_ROWS], (AssertionError, KernelError)),
    Mutation("vectors that are not aligned", "elements.cuh",
             "const int64_t until = past == 0 ? 0 : kSize - past;", "const int64_t until = 0;",
             FORWARD, [BLOCK_ROWS], KernelError, "undefined behaviour .*misaligned address"),
    Mutation("a vector that begins before its row", "elements.cuh",
             "if (c >= 0 && c + Vector<T>::kSize <= n) return Vector<T>::load(row + c);",
             "if (c + Vector<T>::kSize <= n) return Vector<T>::load(row + c);",
             FORWARD, [variant(REGISTER_ROWS, shape=(5, 41))], AssertionError, "output"),
    Mutation("a gradient taken to be as aligned as its logits", "elements.cuh",
             "if (aligned) {\n    v.store(p);", "if (true) {\n    v.store(p);",
             BACKWARD, [BLOCK_ROWS], KernelError, "undefined behaviour .*misaligned address",
             [Settings(shifts=(0, 1))]),
    Mutation("ignore_index ignored", "targets.cuh",
             "const bool ignored = y.index == t.ignore_index;", "const bool ignored = false;",
             FORWARD, [Case("", "", (5, 40), ignored="some", reduction="none")], AssertionError, "output"),
    Mutation("rows that no block takes", "cross_entropy_backward.cuh",
             "for (int64_t unit = blockIdx.x;; unit += gridDim.x)",
             "for (int64_t unit = blockIdx.x; unit < gridDim.x; unit += gridDim.x)",
             BACKWARD, [variant(BLOCK_ROWS, shape=(50, 1101))], AssertionError, "",
             [Settings(device=CudaDevice(1, 227 << 10))]),
    Mutation("a target that is given to another thread", "elements.cuh",
             "thread == static_cast<uint32_t>(t_);", "thread == static_cast<uint32_t>(t_ ^ 1);",
             BACKWARD, [BLOCK_ROWS], AssertionError),
    Mutation("the target's logit read where the gradient is", "cross_entropy_backward.cuh",
             "gradient(to_acc(target_logit), gradient.target)", "gradient(to_acc(x[target]), gradient.target)",
             BACKWARD, [SPLIT_ROWS], AssertionError, "", [Settings(together=True, in_place=True)]),
    Mutation("an atomic that the host does not see", "targets.cuh",
             "atomicCAS_system(&bad->claimed, 0, 1)", "atomicCAS(&bad->claimed, 0, 1)",
             BACKWARD, [BAD_ROWS], KernelError, "an atomic of the device on memory that the host writes"),
    Mutation("threads that leave before a shuffle", "cross_entropy_rows.cuh",
             "const int64_t mine = first + lane * rows_at_once + group;",
             "const int64_t mine = first + lane * rows_at_once + group; if (mine >= end) return;",
             FORWARD, [Case("", "", (5, 100), reduction="none")], KernelError, "deadlock .* wait in __shfl_"),
    Mutation("threads beyond a plane", "cross_entropy_backward.cuh",
             "if (inner >= p.extent.inner) continue;\n    const T* x", "const T* x",
             BACKWARD, [Case("", "", (1, 9, 27), reduction="none")], KernelError, "segmentation fault"),
    Mutation("parts of a row that are merged before all are there", "loss_sum.cuh",
             "complete[0] = atomicAdd(counter, done) + done == all;",
             "complete[0] = atomicAdd(counter, done) + done >= all - 1;",
             FORWARD, [SPLIT_ROWS], AssertionError, "", DISORDER),
    Mutation("a counter that is left as it is", "loss_sum.cuh",
             "*counter = 0;", "",
             FORWARD, [SPLIT_ROWS], AssertionError, "counters that are not zero"),
    Mutation("smoothing that a launch leaves out", "dispatch.cuh",
             "p.targets.uniform = ", "p.targets.scale = ",
             FORWARD, [variant(TILE_ROWS, label_smoothing=0.1)], AssertionError, "output"),
    Mutation("a row kept too long", "elements.cuh",
             "head + static_cast<int64_t>(kept) * Vector<T>::kSize", "head + static_cast<int64_t>(kept + 1) * Vector<T>::kSize",
             FORWARD, [variant(BLOCK_ROWS, reduction="mean")], KernelError, "written behind its end|AddressSanitizer",
             [Settings(together=True, device=CudaDevice(2, 24 << 10))]),
    Mutation("a moment that stays behind when the maximum moves", "softmax_statistics.cuh",
             "moment = (moment + sum * not_vanished(shift)) * factor;", "moment *= factor;",
             STATISTICS, [StatisticsCase((9, 300))], AssertionError),
    Mutation("the last of equal classes predicted", "softmax_statistics.cuh",
             "return a < b ? a : b;", "return a < b && b != INT64_MAX ? b : a < b ? a : b;",
             STATISTICS, [StatisticsCase((8, 9), special=True)], AssertionError),
    Mutation("no barrier before the states of other warps are read", "softmax_statistics.cuh",
             "__syncthreads();  // the states of all warps are there", "",
             STATISTICS, [StatisticsCase((3, 5003))], AssertionError, "", DISORDER),
    Mutation("a copy used before it has come", "elements.cuh",
             "wait_for_copies(ahead - 1);", "",
             LOG_SOFTMAX, [CLUSTER_ROWS], AssertionError, "", [Settings()]),
    Mutation("a batch in the place of one that is still to be used", "elements.cuh",
             "from = from == ahead ? 0 : from + 1;", "from = from + 1 == ahead ? 0 : from + 1;",
             FORWARD, [variant(BLOCK_ROWS, dtype=torch.bfloat16, shape=(3, 30_000))], AssertionError, "",
             [Settings(device=CudaDevice(1, 227 << 10))]),
    Mutation("a cluster's states overwritten by those of the next row", "row_state.cuh",
             "turn_ ^= 1;", "",
             LOG_SOFTMAX, [CLUSTER_ROWS], AssertionError, "", CLUSTERS_THAT_WALK),
    Mutation("no wait for the other blocks of a cluster to begin", "row_state.cuh",
             "cluster_wait();  // the others have begun, and their shared memory may be written", "",
             LOG_SOFTMAX, [CLUSTER_ROWS], KernelError, "a second time without cluster_wait", CLUSTERS_THAT_WALK),
    Mutation("no wait for the parts of the other blocks", "row_state.cuh",
             "cluster_wait();  // all parts are there", "",
             LOG_SOFTMAX, [CLUSTER_ROWS], (AssertionError, KernelError), "", CLUSTERS_THAT_WALK),
    Mutation("a part that one block of a cluster is not told", "row_state.cuh",
             "if (to < blocks) *shared_of_rank", "if (to < blocks - 1) *shared_of_rank",
             LOG_SOFTMAX, [CLUSTER_ROWS], AssertionError, "", CLUSTERS_THAT_WALK),
    Mutation("a softcap that the gradient does not know", "row_options.cuh",
             "slope = out * (acc(4) * e * (r * r));", "slope = out;",
             OPTIONS, [OptionsCase((9, 40), options=ALL_OPTIONS)], AssertionError, "grad"),
    Mutation("a target without its share in the gradient of logit_scale", "row_options.cuh",
             "if (added != acc(0)) by_scale += added * target_logit;", "",
             OPTIONS, [OptionsCase((9, 40), options=ALL_OPTIONS)], AssertionError, "grad_logit_scale"),
    Mutation("options of a row that does not count", "row_options.cuh",
             "too.\n  return gradient.counts ? map.per_scale * by_scale : acc(0);",
             "too.\n  return map.per_scale * (gradient.counts ? by_scale : acc(0));",
             OPTIONS, [OptionsCase((9, 40), options=Options(temperature="rows"))], AssertionError, "grad_scale"),
    Mutation("classes behind the last one that are no longer masked", "cross_entropy_options.cuh",
             "start + j < end ? map(to_acc(x[(start + j) * stride])) : to_acc(minus_infinity_of<T>())",
             "map(start + j < end ? to_acc(x[(start + j) * stride]) : to_acc(minus_infinity_of<T>()))",
             OPTIONS, [OptionsCase((1, 9, 8), options=ALL_OPTIONS)], AssertionError, "loss"),
    Mutation("a sample weight that is not in the divisor", "cross_entropy_options.cuh",
             "weight = factor * y.weight;", "weight = y.weight;",
             OPTIONS, [OptionsCase((9, 40), options=ALL_OPTIONS)], AssertionError, "row_weight"),
    Mutation("no barrier before the sums of other warps are read", "row_state.cuh",
             "__syncthreads();  // the sums of all warps are there", "",
             OPTIONS, [OptionsCase((3, 3001), options=ALL_OPTIONS)], AssertionError, "grad_logit_scale", DISORDER),
    Mutation("no barrier before the next sum of a row", "row_state.cuh",
             "__syncthreads();  // the scratch may still be read for the sum before", "",
             OPTIONS, [OptionsCase((3, 3001), target="probabilities", options=ALL_OPTIONS)], AssertionError, "",
             BLOCKS_THAT_WALK),
    Mutation("elements beyond the last one", "elementwise.cuh",
             "const From* from = static_cast<const From*>(data);\n  if (kVectors && i + kSize <= e.count) {",
             "const From* from = static_cast<const From*>(data);\n  if (kVectors && i < e.count) {",
             "mse_loss.cu", [ElementwiseCase((1030,), torch.bfloat16)], (AssertionError, KernelError)),
]  # fmt: skip


def _check(kernels: Kernels, mutation: Mutation) -> None:
    kernels.count_banks(mutation.banks)
    for case in mutation.cases:
        for settings in mutation.settings:
            if isinstance(case, ElementwiseCase):
                check_mse_loss(kernels, case, settings)
            elif isinstance(case, Problem):
                run(kernels, case, settings)
            elif isinstance(case, OptionsCase):
                check_cross_entropy_options(kernels, case, settings)
            elif isinstance(case, StatisticsCase):
                check_softmax_statistics(kernels, case, settings)
            else:
                check(variant(case), run(kernels, build(variant(case)), settings))
    assert set(kernels.count_banks(False).values()) <= {1}, "threads that meet in banks"


@pytest.mark.mutations
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_found(mutation: Mutation, kernels: Kernels, tmp_path: Path) -> None:
    _check(kernels, mutation)  # the comparison passes without the mistake
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    file = csrc / "cuda" / "kernels" / mutation.file
    text = file.read_text()
    assert text.count(mutation.old) == 1, f"{mutation.file} has changed: give this mutation another place"
    file.write_text(text.replace(mutation.old, mutation.new))
    mutated = Kernels(kernels_library(mutation.source, csrc))
    with pytest.raises(mutation.error, match=re.compile(mutation.message, re.DOTALL)):
        _check(mutated, mutation)
