"""Existing code on nllx's losses: torch's functions replaced everywhere (:func:`patch`), or the modules of a model
(:func:`convert`)."""

from __future__ import annotations

import collections
import contextlib
import inspect
import threading
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack, handle_torch_function, has_torch_function
from torch.utils._device import DeviceContext

from nllx import _C, functional, modules
from nllx._operators.losses import in_onnx_export
from nllx._operators.shapes import FLOATING

__all__ = ["convert", "patch", "patch_report", "patched", "revert", "unpatch"]

_torch = torch.nn.functional
_PLAIN = (Tensor, torch.nn.Parameter)
_DEVICES = ("cpu", "cuda", "meta")
_WITH_CUDA = bool(_C.build_info()["cuda"])


def _kept(name: str, fresh: Any) -> Any:
    """State of the process, which importlib.reload must not forget."""
    return globals().get(name, fresh)


_lock = _kept("_lock", threading.RLock())
_always = _kept("_always", False)  # patch() without unpatch()
_entered = _kept("_entered", 0)  # how many patched() are under way, in all threads
_on = _kept("_on", False)  # one of the two: what compiled graphs depend on, and so no number
_torchs: dict[str, Callable[..., Tensor]] = functional._TORCHS
_originals: dict[str, Callable[..., Tensor]] = _kept("_originals", dict(_torchs))  # what was there before
_installed: set[str] = _kept("_installed", set())  # what stands in torch.nn.functional, or did when somebody wrapped it
_wrappers: dict[str, Callable[..., Tensor]] = _kept("_wrappers", {})  # what they put there
_counts: dict[str, collections.Counter[str]] = _kept("_counts", {name: collections.Counter() for name in _torchs})

_Module = TypeVar("_Module", bound=torch.nn.Module)
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _has_own_torch_function(t: Any) -> bool:
    """Whether a tensor is of a class that handles torch's functions one by one, and knows none of nllx's."""
    if type(t) in _PLAIN or not isinstance(t, Tensor):
        return False
    handler = type(t).__torch_function__
    return (
        handler is not torch._C._disabled_torch_function_impl
        and getattr(handler, "__func__", None) is not Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
    )


def _why_torch(input: Any, dtype: torch.dtype | None, *others: Any) -> str | None:
    """Why torch has to compute it, or None. Mistakes are for nllx to tell, as torch would."""
    if not torch.compiler.is_compiling():
        if torch._C._len_torch_function_stack() and not all(
            isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack()
        ):
            return "a TorchFunctionMode"  # which is to see torch's function
        if torch._C._get_tracing_state() is not None and in_onnx_export():
            return "ONNX"  # which has no operators for nllx's
        if (hooks := _C.pack_hooks()) and _follow_checkpoints(hooks):
            return "a checkpoint whose forward ran on torch"
        if dtype is None and _C.are_plain(input, *others):  # nearly all calls, in less time than a small loss takes
            return None
    elif in_onnx_export():  # by torch.export
        return "ONNX"
    if not isinstance(input, Tensor):
        return None
    if _has_own_torch_function(input) or any(_has_own_torch_function(t) for t in others):
        with torch._C.DisableTorchFunctionSubclass():  # which sees attributes too
            return "nested" if input.is_nested else "a subclass of Tensor with a __torch_function__ of its own"
    if any(type(t).__name__ == "DTensor" for t in (input, *others)):
        return "DTensor"  # whose operations are sharded one by one
    for t in (input, *others):
        if isinstance(t, Tensor) and (t.layout != torch.strided or t.is_nested):
            return "nested" if t.is_nested else f"layout {t.layout}"
    dtype = dtype or input.dtype
    if dtype not in FLOATING:
        return f"dtype {dtype}"
    if input.device.type not in _DEVICES:
        return f"device {input.device.type}"
    if input.device.type == "cuda" and not _WITH_CUDA:
        return "nllx was built without CUDA"
    if any(isinstance(t, Tensor) and t.is_complex() for t in others):
        return "complex target or weight"
    return None


class _Recomputation:
    """What a checkpoint computes again, patched as its forward was, whether or not torch still is by then: it checks that the
    same tensors are saved."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.calls: set[int] = set()  # those that were patched, by how many tensors had been saved

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with patched():
            return self._function(*args, **kwargs)


def _follow_checkpoints(hooks: list[Callable[..., Any]]) -> bool:
    """Notes this call for the non-reentrant checkpoint (torch.utils.checkpoint) whose forward is under way, so that it is
    patched when that is computed again; and tells whether one is being computed again whose forward had it from torch.

    Its hooks, which see what is saved, are the one place where it is found; what those hold is not public. Where they hold
    something else nothing is noted, and a checkpoint that comes out otherwise raises CheckpointError, as it did.
    """
    for hook in map(inspect.unwrap, hooks):
        if not inspect.isfunction(hook) or hook.__module__ != "torch.utils.checkpoint":
            continue
        held: dict[str, Any] = dict(inspect.getclosurevars(hook).nonlocals)
        again = "target_frame_ref" in held
        frame: Any = held["target_frame_ref"]() if again else held.get("frame")
        function = getattr(frame, "recompute_fn", None)
        if function is None:
            continue
        if again:
            calls = function.calls if isinstance(function, _Recomputation) else ()
            return frame.recomp_counter[held["gid"]] not in calls
        if not isinstance(function, _Recomputation):
            function = frame.recompute_fn = _Recomputation(function)
        function.calls.add(len(frame.weak_holders))
        return False  # of checkpoints inside of each other the innermost alone sees what is saved
    return False


def _run(name: str, reason: str | None, tensors: tuple[Any, ...], arguments: tuple[Any, ...]) -> Tensor:
    """Calls torch's function for a reason, or nllx's, and counts it: in eager mode, since a compiler sees a call once."""
    if not _on:  # somebody kept the replacement, or wrapped it
        return _originals[name](*arguments)
    if not torch.compiler.is_compiling():
        with _lock:
            _counts[name]["nllx" if reason is None else reason] += 1
    if reason is None:
        return getattr(functional, name)(*arguments)
    original = _originals[name]
    if has_torch_function(
        tensors
    ):  # a mode too; torch would give them the function that it finds under its name: the replacement
        return handle_torch_function(original, tensors, *arguments)
    return original(*arguments)


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """:func:`torch.nn.functional.cross_entropy`, by nllx where it can."""
    arguments = (input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    reason = _why_torch(input, None, target, weight)
    if reason is None and (label_smoothing.__class__ is not float or not label_smoothing >= 0):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):  # mistakes are for nllx to tell
            reason = reason if float(label_smoothing) >= 0 else "label_smoothing below 0"
    return _run("cross_entropy", reason, (input, target, weight), arguments)


def _nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """:func:`torch.nn.functional.nll_loss`, by nllx where it can."""
    arguments = (input, target, weight, size_average, ignore_index, reduce, reduction)
    return _run("nll_loss", _why_torch(input, None, target, weight), (input, target, weight), arguments)


def _log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """:func:`torch.nn.functional.log_softmax`, by nllx where it can."""
    return _run("log_softmax", _why_torch(input, dtype), (input,), (input, dim, _stacklevel + 2, dtype))


def _mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """:func:`torch.nn.functional.mse_loss`, by nllx where it can."""
    arguments = (input, target, size_average, reduce, reduction, weight)
    reason = _why_torch(input, None, target, weight)
    of_dtype = isinstance(input, Tensor) and isinstance(target, Tensor) and reason in (None, f"dtype {input.dtype}")
    if of_dtype and input.dtype != target.dtype:  # by the one that they are promoted to
        # A compiler takes torch.result_type for a result that is no tensor.
        compiling = torch.compiler.is_compiling()
        dtype = torch.promote_types(input.dtype, target.dtype) if compiling else torch.result_type(input, target)
        reason = _why_torch(input, dtype, target, weight)
    return _run("mse_loss", reason, (input, target, weight), arguments)


_REPLACEMENTS: dict[str, Callable[..., Tensor]] = _kept(
    "_REPLACEMENTS", {name: globals()[f"_{name}"] for name in _torchs}
)
for _name, _replacement in _REPLACEMENTS.items():
    # As torch's own: pickles hold the function's name, and mean whatever is there when they are loaded.
    _replacement.__name__ = _replacement.__qualname__ = _name
    _replacement.__module__ = "torch.nn.functional"
    # torch.jit.script compiles torch's function.
    _replacement.__prepare_scriptable__ = lambda name=_name: _torchs[name]  # type: ignore[attr-defined]


def _update() -> None:
    """Puts the functions of torch.nn.functional where they belong; called with the lock.

    Somebody may have wrapped ours. The wrapper stays, as its owner will want to take it away himself; ours, which it calls,
    goes on or steps aside. To wrap the wrapper would be a circle. torch's own function is never a wrapper: whoever had put
    something in its place before us has taken that away.
    """
    global _on
    _on = _always or _entered > 0
    for name, replacement in _REPLACEMENTS.items():
        current = getattr(_torch, name)
        known = (_originals[name], _torchs[name])
        if _on:
            if current is not replacement and current is not _wrappers.get(name):
                if name in _installed and current not in known:
                    _wrappers[name] = current
                else:
                    _originals[name] = current
                    _wrappers.pop(name, None)
                    setattr(_torch, name, replacement)
            _installed.add(name)
        elif name in _installed:
            if current is replacement:
                setattr(_torch, name, _originals[name])
            elif current not in known:
                _wrappers[name] = current
            _installed.discard(name)


def patch() -> None:
    """Routes ``torch.nn.functional.cross_entropy``, ``nll_loss``, ``log_softmax`` and ``mse_loss`` to nllx, until
    :func:`unpatch`.

    The modules ``torch.nn.CrossEntropyLoss``, ``NLLLoss``, ``LogSoftmax`` and ``MSELoss`` call these functions, those already
    built too.
    What nllx does not take (other dtypes, devices and layouts, subclasses of Tensor that handle torch's functions
    themselves, calls under a ``TorchFunctionMode``) goes to torch as before; :func:`patch_report` tells. A second call changes
    nothing. Where somebody has put another function in the place of nllx's, it stays, with a warning.

    It holds for the whole process, all threads included, since autograd runs forward code in threads of its own
    (``torch.utils.checkpoint``). Names imported from torch before (``from torch.nn.functional import cross_entropy``),
    ``torch.log_softmax``, ``torch.special.log_softmax``, methods (``Tensor.log_softmax``) and code of ``torch.jit.script`` are
    not routed. (Names imported before do come to nllx where torch looks its own function up again: under a ``torch.device``
    context, and for subclasses of Tensor, whose ``__torch_function__`` then gets nllx's.) Graphs that were compiled or traced
    by ``torch.fx`` while patched keep nllx's operators. What a non-reentrant checkpoint (``torch.utils.checkpoint``) computes
    again runs on what its forward ran on, patched or not by then. Spawned processes start unpatched. Classes of tensors and
    modes get torch's own function, which is not what ``torch.nn.functional`` holds meanwhile: those that look it up there
    at each call do not know it.

    nllx saves the logits where torch saves their log-softmax. Logits that are changed in place between forward and backward
    raise RuntimeError; torch does not look at them again. Changes that autograd does not see (``logits.data``, NumPy) make
    the gradient wrong.
    """
    global _always
    with _lock:
        _always = True
        _update()
        for name, wrapper in _wrappers.items():
            if getattr(_torch, name) is wrapper:
                warnings.warn(
                    f"nllx.patch: torch.nn.functional.{name} is {wrapper!r}, which took the place of nllx's; nllx runs where "
                    "that calls what it had found, and otherwise does not",
                    stacklevel=2,
                )


def unpatch() -> None:
    """Undoes :func:`patch`. Inside of :func:`patched` torch's functions come back when that ends."""
    global _always
    with _lock:
        _always = False
        _update()


class patched(contextlib.ContextDecorator):
    """:func:`patch` for the time of a ``with`` block, or of a function that it decorates.

    Blocks may be inside of each other and in several threads: torch's functions come back with the end of the last one,
    with an exception too.

    Raises:
        TypeError: a generator or a coroutine is decorated, whose body runs after the call: put the block inside.
    """

    def __call__(self, function: _Function) -> _Function:
        if (
            inspect.isgeneratorfunction(function)
            or inspect.iscoroutinefunction(function)
            or inspect.isasyncgenfunction(function)
        ):
            raise TypeError(
                f"nllx.patched: the body of {function.__name__}, a generator or coroutine, runs after the call; write "
                "`with nllx.patched():` inside of it"
            )
        return super().__call__(function)

    def __enter__(self) -> None:
        global _entered
        with _lock:
            _entered += 1
            _update()

    def __exit__(self, *exception: object) -> None:
        global _entered
        with _lock:
            _entered -= 1
            _update()


def patch_report(*, reset: bool = False) -> dict[str, dict[str, int]]:
    """How many calls of each patched function ran where, since the start or the last ``reset``.

    Returns:
        For each function a dict from ``"nllx"``, or the reason why torch computed it, to the number of calls. Calls from
        graphs of ``torch.compile`` are not seen.

    >>> with nllx.patched():
    ...     loss = torch.nn.CrossEntropyLoss()(torch.zeros(2, 3), torch.tensor([0, 2]))
    >>> nllx.patch_report()["cross_entropy"]
    {'nllx': 1}
    """
    with _lock:
        report = {name: dict(counts) for name, counts in _counts.items()}
        if reset:
            for counts in _counts.values():
                counts.clear()
    return report


_MODULES: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    getattr(torch.nn, name): getattr(modules, name) for name in modules.__all__
}


def convert(module: _Module, *, verbose: bool = True) -> _Module:
    """Makes the losses inside of a model nllx's: ``CrossEntropyLoss``, ``NLLLoss``, ``LogSoftmax`` and ``MSELoss``, itself
    included.

    Each stays the same object, with its weights, options, hooks and mode, and gets nllx's class (a subclass of torch's).
    Subclasses that users wrote are left as they are, since their ``forward`` may do anything, and so are modules whose
    ``forward`` has been replaced (hooks of accelerate), or that have an attribute with the name of an option of nllx's
    (``temperature``, say). Libraries that look modules up by ``type(module)`` and not by
    ``isinstance`` (BackPACK, for one) do not know nllx's classes: :func:`revert` is the way back, and :func:`patch` leaves the
    classes alone.

    Args:
        module: The model; changed in place.
        verbose: Print a line for each module that was converted, or one that there was none.

    Returns:
        ``module``.
    """
    found = False
    for name, child in module.named_modules():
        replacement = _MODULES.get(type(child))
        if replacement is None:
            continue
        found = True
        left = ""
        if "forward" in vars(child):
            left = " is left as it is, since its forward has been replaced"
        elif own := modules.row_options_in(child):  # of the user's own meaning, which torch's forward does not look at
            left = f" is left as it is, since it has an attribute {own[0]}, which is an option of nllx's"
        else:
            child.__class__ = replacement
        if verbose:
            print(f"nllx.convert: {name or 'the module itself'}: {child}{left}")
    if verbose and not found:
        print(
            f"nllx.convert: {type(module).__name__} holds no CrossEntropyLoss, NLLLoss, LogSoftmax or MSELoss of torch: "
            "nothing is converted. Losses that are called as functions are nllx's with nllx.patch()"
        )
    return module


def revert(module: _Module, *, verbose: bool = True) -> _Module:
    """Makes nllx's losses inside of a model torch's, itself included: what :func:`convert` did, undone.

    Each stays the same object, with its weights, options, hooks and mode, and gets torch's class; modules that were made as
    nllx's too. What torch's has not is dropped: ``inplace_backward``, which changes no value. Modules whose ``forward`` has
    been replaced (hooks of accelerate) are left as they are: it is nllx's that theirs calls.

    Args:
        module: The model; changed in place.
        verbose: Print a line for each module that was reverted, or one that there was none.

    Returns:
        ``module``.

    Raises:
        ValueError: one has ``zero_division=0`` or another option without which its values would be others; nothing is changed
            then.
    """
    originals = {ours: torchs for torchs, ours in _MODULES.items()}
    all_of_nllx = [(name or "the module itself", m) for name, m in module.named_modules() if type(m) in originals]
    found = [(name, child) for name, child in all_of_nllx if "forward" not in vars(child)]
    for name, child in found:
        if own := modules.options_beyond_torch(child):
            raise ValueError(f"nllx.revert: {name}: {child}: torch's losses have no {own[0]}")
    for name, child in found:
        child.__class__ = originals[type(child)]
        for option in ("inplace_backward", "zero_division", "_has_row_options"):
            vars(child).pop(option, None)
        if verbose:
            print(f"nllx.revert: {name}: {child}")
    for name, child in all_of_nllx:
        if verbose and "forward" in vars(child):
            print(f"nllx.revert: {name}: {child} is left as it is, since its forward has been replaced")
    if verbose and not all_of_nllx:
        print(f"nllx.revert: {type(module).__name__} holds no loss of nllx")
    return module
