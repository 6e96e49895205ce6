"""Functions written for calls like one that was made: they tell them apart, and do them again.

Tensors are compared by the guards that torch.compile puts before what it compiles: one call into
C++, where to hash their metadata as Python objects took 5 us.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashtile import config
from flashtile.backends import replays
from flashtile.observers import hears_functions

TensorGuards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)
"""torch's own business: another version may have none."""

_SWITCHES = (
    "config.allow_tf32 is allow_tf32", "is_deterministic() is deterministic", "not config.checked",
    "forward_ad._current_level < 0", "not (modes() and hears_functions())",
)  # fmt: skip
"""What a call depends on besides its arguments."""


def written(
    tensors: Sequence[Tensor | None],
    result: Callable[[str, str], str],
    tests: Iterable[str],
    names: dict[str, Any],
) -> Callable[..., Any]:
    """A function of tensors like these: what `result` is the source of, or None for any others.

        def again(t0, t1, t2, t3):
            if not (check(t0, t1, t2) and t3 is None and ...): return None
            p0 = t0.data_ptr()
            ...
            if (p0 | p1 | p2) & 15: return None
            return run(t0, t1, t2, p0, p1, p2)

    result: from the source of the tensors that there are, and of their addresses. tests: source of
    what must be true besides. names: what these two speak of. The guards see types, sizes, strides,
    devices, what requires grad, transforms and modes of dispatch, but not the mode of recording.
    """
    first = [next(j for j, y in enumerate(tensors) if y is x) for x in tensors]
    given = [i for i, x in enumerate(tensors) if x is not None]
    apart = {i: x for i, x in enumerate(tensors) if x is not None and first[i] == i}
    recorded = [f"recorded() is {torch.is_grad_enabled()}"]
    every = (
        f"check({_names('t', apart)})",
        *(f"t{i} is None" for i, x in enumerate(tensors) if x is None),
        *(f"t{i} is t{first[i]}" for i in given if first[i] != i),
        *_SWITCHES,
        *(recorded if any(x.requires_grad for x in apart.values()) else ()),
        *(f"device() == {x.get_device()}" for x in (*apart.values(),)[:1] if x.is_cuda),
        *tests,
    )
    lines = (
        f"def again({_names('t', range(len(tensors)))}):",
        f"if not ({' and '.join(every)}): return None",
        *(f"p{i} = t{i}.data_ptr()" for i in apart),
        f"if {_otherwise_aligned(apart)}: return None",
        f"return {result(_names('t', given), _names('p', [first[i] for i in given]))}",
    )
    known = {
        **names,
        "check": TensorGuards(
            *apart.values(), dynamic_dims_sizes=None, dynamic_dims_strides=None
        ).check,
        "recorded": torch.is_grad_enabled,
        "config": config, "allow_tf32": config.allow_tf32,
        "is_deterministic": torch._C._get_deterministic_algorithms,
        "deterministic": torch._C._get_deterministic_algorithms(),
        "forward_ad": forward_ad, "hears_functions": hears_functions,
        "modes": torch._C._len_torch_function_stack,
        "device": getattr(torch._C, "_cuda_getDevice", None),
    }  # fmt: skip
    exec(replays.compiled("\n    ".join(lines)), known)
    return known["again"]


def _names(letter: str, places: Iterable[int]) -> str:
    return ", ".join(f"{letter}{i}" for i in places)


def _otherwise_aligned(tensors: dict[int, Tensor]) -> str:
    """Source of whether one of the addresses lies otherwise between multiples of 16."""
    rests = {i: x.data_ptr() & 15 for i, x in tensors.items()}
    found = [f"p{i} & 15 != {rest}" for i, rest in rests.items() if rest]
    if aligned := [f"p{i}" for i, rest in rests.items() if not rest]:
        found.append(f"({' | '.join(aligned)}) & 15")
    return " or ".join(found)
