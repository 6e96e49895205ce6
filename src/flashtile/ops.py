"""The torch operators: schemas, implementations, fakes, autograd and autocast, in one place.

`flashtile::forward`, `flashtile::backward` and `flashtile::with_kvcache` take a `Call` flattened
into its schema's order. They are registered with `torch.library.Library` rather than `custom_op`,
which costs 4 us a call instead of 17.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from flashtile import guards, values
from flashtile.backends import cache, cached, replays
from flashtile.form import POSITIONS, Form
from flashtile.observers import unseen
from flashtile.plan import Device, Plan, plan
from flashtile.problem import E4M3, Call, describe, mask_grid

_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? attn_mask, Tensor? alibi_slopes, "
    "Tensor? learnable_sink, Tensor? document_ids_q, Tensor? document_ids_k, Tensor? rng_state, "
    "Tensor? mask_blocks, Tensor? tree_mask, Tensor? k_descale, Tensor? v_descale, "
    "Tensor? mod_0, Tensor? mod_1, Tensor? mod_2, Tensor? mod_3, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, "
    "Tensor? block_table, Tensor? cache_batch_idx, Tensor? cache_leftpad, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "float softmax_scale, SymInt window_left, SymInt window_right, "
    "SymInt attention_chunk, float softcap, float dropout_p, bool deterministic, "
    "int score_mod, int mask_mod, int num_splits, int split_size, bool latent"
)
_CACHE_CALL = _CALL.replace("Tensor k, Tensor v", "Tensor(a!) k_cache, Tensor(b!) v_cache")
_CACHE_CALL = _CACHE_CALL.replace(
    "Tensor? k_descale, Tensor? v_descale", "Tensor(c!)? k_descale, Tensor(d!)? v_descale"
)
_NEW_TOKENS = (
    "Tensor? k_new, Tensor? v_new, Tensor? cu_seqlens_k_new, Tensor? rotary_cos, "
    "Tensor? rotary_sin, Tensor? rotary_seqlens, Tensor? prefix_k, Tensor? prefix_v, "
    "bool rotary_interleaved"
)
_UNCAST = (torch.float64, E4M3)
_NEW = len(cache.NewTokens._fields)

_library = torch.library.Library("flashtile", "DEF")
_library.define(f"forward({_CALL}) -> (Tensor out, Tensor lse)")
_library.define(
    f"backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_CALL}, bool[] needs)"
    " -> Tensor[]"
)
_library.define(f"with_kvcache({_NEW_TOKENS}, {_CACHE_CALL}) -> (Tensor out, Tensor lse)")
_library.define(f"classify({_CALL}) -> Tensor")


def _plan(call: Call) -> Plan:
    return plan(describe(call), Device.of(call.operands.q.device))


def _backend(name: str) -> Any:
    """A backend's module. Triton is imported by the first call that needs it."""
    return importlib.import_module(f"flashtile.backends.{name}")


def _forward_of(chosen: Plan) -> Any:
    """The module that computes a plan's forward."""
    if chosen.decode is not None:
        return _backend("decode")
    return _backend(chosen.backend)


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the operands'."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


def _run_forward(call: Call) -> tuple[Tensor, Tensor]:
    form, tensors = Form.of(call.flat())

    def compute(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        call = Call.unflatten(tuple(form.flat(tensors)))
        chosen = _plan(call)
        return _forward_of(chosen).forward(call, chosen)

    return _run(kind_of_forward(form), tensors, compute)


def kind_of_forward(form: Form) -> tuple[Any, ...]:
    """What forward depends on besides its tensors. Who wants another backend replaces `plan`."""
    return "forward", plan, form


def _run(kind: Any, tensors: Sequence[Tensor], compute: Callable[..., Any]) -> Any:
    q = tensors[0]
    if not classifies(q.device.type):
        return compute(tensors)
    if not q.is_cuda or q.get_device() == torch.cuda.current_device():
        return replays.run(kind, tensors, compute)
    with _device_of(q):
        return replays.run(kind, tensors, compute)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    call = Call.unflatten(args)
    values.check(call)
    return _run_forward(call)


def _backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *args: Any
) -> list[Tensor]:
    *flat, needs = args
    form, tensors = Form.of(flat)
    return _run_backward(form, tensors, tuple(needs), dout, dlse, out, lse)


def _run_backward(
    form: Form,
    tensors: Sequence[Tensor],
    needs: tuple[bool, ...],
    dout: Tensor,
    dlse: Tensor | None,
    *results: Tensor,
) -> list[Tensor]:
    """The gradients that are asked for, none of them None."""
    count = len(tensors)

    def compute(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        call = Call.unflatten(tuple(form.flat(tensors[:count])))
        out, lse, dout, *more = tensors[count:]
        dlse = more[0] if more else None
        chosen = _plan(call)
        grads = _backend(chosen.gradients).backward(call, chosen, dout, dlse, out, lse, needs)
        return tuple(grad for grad in grads if grad is not None)

    cotangents = (dout,) if dlse is None else (dout, dlse)
    return list(_run(("backward", plan, needs, form), (*tensors, *results, *cotangents), compute))


def _with_kvcache(*args: Any) -> tuple[Tensor, Tensor]:
    new, flat = cache.NewTokens(*args[:_NEW]), args[_NEW:]
    values.check_append(Call.unflatten(flat), new)
    form, tensors = Form.of(flat)
    given, count = _given(new), len(tensors)

    def compute(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        call, rest = Call.unflatten(tuple(form.flat(tensors[:count]))), iter(tensors[count:])
        which = (next(rest) if is_given else None for is_given in given)
        again: tuple[Any, ...] = *which, new.rotary_interleaved
        return cached.forward(call, cache.NewTokens(*again), _plan, _forward_of)

    return _run(kind_of_cache(form, new), [*tensors, *new.tensors()], compute)


def kind_of_cache(form: Form, new: cache.NewTokens) -> tuple[Any, ...]:
    """What a call over a cache depends on besides its tensors."""
    return "cache", plan, form, _given(new), new.rotary_interleaved


def _given(new: cache.NewTokens) -> tuple[bool, ...]:
    return tuple(x is not None for x in new[:-1])


def _classify(*args: Any) -> Tensor:
    """Codes of the tiles of the mask tensors; all "partly visible" where a backend has no use."""
    form, tensors = Form.of(args)

    def compute(tensors: Sequence[Tensor]) -> tuple[Tensor]:
        call = Call.unflatten(tuple(form.flat(tensors)))
        if _plan(call).backend == "torch":
            q = call.operands.q
            return (torch.ones(mask_grid(call), dtype=torch.uint8, device=q.device),)
        return (_backend("blocklists").classify(call),)

    return _run(("classify", plan, form), tensors, compute)[0]


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor]:
    call = Call.unflatten(args)
    q, v = call.operands.q, call.operands.v
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty(call.lse_shape, dtype=lse_dtype)


def _fake_backward(dout: Any, dlse: Any, out: Any, lse: Any, *args: Any) -> list[Tensor]:
    *flat, needs = args
    return [
        flat[at].new_empty(flat[at].shape)
        for at, need in zip(POSITIONS, needs, strict=True)
        if need and flat[at] is not None
    ]


def _fake_classify(*args: Any) -> Tensor:
    call = Call.unflatten(args)
    return call.operands.q.new_empty(mask_grid(call), dtype=torch.uint8)


def _fake_with_kvcache(*args: Any) -> tuple[Tensor, Tensor]:
    return _fake_forward(*args[_NEW:])


class Recorded:
    """What a call leaves to its backward besides tensors: its form, and functions for backwards
    like those of its like, by the gradients that are asked for."""

    def __init__(self, form: Form, kept: bool) -> None:
        self.form, self._kept = form, kept
        self._again: dict[tuple[tuple[bool, ...], bool], Callable[..., Any] | None] = {}

    def gradients(
        self, needs: tuple[bool, ...], dout: Tensor, dlse: Tensor | None, *saved: Tensor
    ) -> Sequence[Tensor]:
        """Those that are asked for."""
        *tensors, out, lse = saved
        these = (*saved, dout) if dlse is None else (*saved, dout, dlse)
        key = needs, dlse is None
        again = None if torch.compiler.is_dynamo_compiling() else self._again.get(key)
        if again is not None and (found := again(*these)) is not None:
            return found
        if torch.is_grad_enabled() or not unseen((dout, dlse, out, lse, *tensors)):
            return torch.ops.flashtile.backward.default(
                dout, dlse, out, lse, *self.form.flat(tensors), needs
            )
        found = _run_backward(self.form, tensors, needs, dout, dlse, out, lse)
        if self._kept and key not in self._again:
            kind = "backward", plan, needs, self.form
            run = replays.find(replays.key_of(kind, these))
            self._again[key] = None if run is None else _gradients_again(run, these)
        return found


def _gradients_again(run: Callable[..., Any], tensors: Sequence[Tensor]) -> Callable[..., Any]:
    names = {"ops": sys.modules[__name__], "plan": plan, "run": run}
    return guards.written(
        tensors, lambda these, addresses: f"run({these}, {addresses})", ["ops.plan is plan"], names
    )


class _Attention(torch.autograd.Function):
    """Autograd of `forward`. `torch.library.register_autograd` would cost 400 us a call: it walks
    the schema's 26 arguments once for each of them."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., tuple[Tensor, Tensor]],
        left: Recorded,
        addresses: tuple[int, ...],
        return_lse: bool,
        *tensors: Tensor,
    ) -> Any:
        out, lse = run(*tensors, *addresses)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.left = left
        if not return_lse:  # a result less for autograd to keep track of, 0.5 us
            return out
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None) -> tuple[Any, ...]:
        saved, left, asked = ctx.saved_tensors, ctx.left, ctx.needs_input_grad
        gradients: list[Tensor | None] = [None] * len(asked)
        wanted = left.form.wanted
        needs = tuple([at >= 0 and asked[_BEFORE + at] for at in wanted])
        if any(needs) and not (dout is None and dlse is None):
            dout = torch.zeros_like(saved[-2]) if dout is None else dout
            following = iter(left.gradients(needs, dout, dlse, *saved))
            for at, need in zip(wanted, needs, strict=True):
                if need:
                    gradients[_BEFORE + at] = next(following)
        return tuple(gradients)


_BEFORE = 4
"""Arguments of `_Attention` before its tensors."""

_apply = super(torch.autograd.Function, _Attention).apply
"""`_Attention.apply` without a look for functorch, 3 us sooner."""


class _Gradients(torch.autograd.Function):
    """Autograd of `backward`: there is none."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(torch.ops.flashtile.backward.default(*args))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "flashtile has no second derivative: backward was called through a gradient of "
            "attention (create_graph=True). flashtile.reference.attention is differentiable any "
            "number of times."
        )


def _records(args: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)


def _autograd_forward(*args: Any) -> tuple[Tensor, Tensor]:
    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.flashtile.forward.default(*form.flat(tensors))

    form, tensors = Form.of(args)
    if not _records(tensors):
        return run(*tensors)
    return _Attention.apply(run, Recorded(form, kept=False), (), True, *tensors)


def _autograd_backward(*args: Any) -> list[Tensor]:
    if _records(args):
        return list(_Gradients.apply(*args))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.flashtile.backward.default(*args)


def recording(tensors: Sequence[Tensor]) -> Any:
    """What a replay of the operator's forward goes through where nobody sees it and gradients are
    recorded: `_Attention`, of (run, Recorded, addresses, return_lse, *tensors). Else None."""
    return _apply if _records(tensors) else None


def _autocast(op: Any, key: str, first: int) -> Any:
    """Run `op` with q, k and v (from argument `first` on) in the autocast dtype."""

    without = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(keyset: Any, *args: Any) -> Any:
        device_type = args[first].device.type
        dtype = torch.get_autocast_dtype(device_type)
        cast = [
            x.to(dtype) if x.is_floating_point() and x.dtype not in _UNCAST else x
            for x in args[first : first + 3]
        ]
        with torch._C._ExcludeDispatchKeyGuard(without):
            return op(*args[:first], *cast, *args[first + 3 :])

    return kernel


_library.impl("forward", _forward, "CompositeExplicitAutograd")
_library.impl("backward", _backward, "CompositeExplicitAutograd")
_library.impl("with_kvcache", _with_kvcache, "CompositeExplicitAutograd")
_library.impl("classify", _classify, "CompositeExplicitAutograd")
torch.library.register_fake("flashtile::forward", _fake_forward, lib=_library)
torch.library.register_fake("flashtile::backward", _fake_backward, lib=_library)
torch.library.register_fake("flashtile::with_kvcache", _fake_with_kvcache, lib=_library)
torch.library.register_fake("flashtile::classify", _fake_classify, lib=_library)
_library.impl("forward", _autograd_forward, "Autograd")
_library.impl("backward", _autograd_backward, "Autograd")
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl(
        "forward", _autocast(torch.ops.flashtile.forward.default, _key, 0), _key, with_keyset=True
    )

forward = torch.ops.flashtile.forward.default
with_kvcache = torch.ops.flashtile.with_kvcache.default


def with_mask_blocks(call: Call) -> Call:
    """Classify the tiles of masks given as tensors, once for forward and backward.

    Not on the CPU, whose backend has no use for it, nor for packed sequences of unknown length,
    whose grid of tiles would be quadratic in the number of tokens.
    """
    operands = call.operands
    if not call.classified or not classifies(operands.q.device.type):
        return call
    codes = torch.ops.flashtile.classify.default(*call.flat())
    return call._replace(operands=operands._replace(mask_blocks=codes))


def classifies(device_type: str) -> bool:
    """Whether kernels compute calls on such a device: their masks come classified, and they are
    replayed."""
    return device_type == "cuda"
