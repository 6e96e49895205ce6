"""Drop-in modules for code that was written against other attention packages.

`install()` puts `flashtile.compat.flash_attn` under the name `flash_attn` in `sys.modules`, so that
`import flash_attn` and everything below it find flashtile. Nothing happens until it is called.
Code that asks package metadata (`importlib.metadata.version("flash-attn")`) instead of importing
sees no change: only a distribution of that name could answer it.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

__all__ = ["install", "uninstall"]

_NAME = "flash_attn"
_OURS = f"{__name__}.flash_attn"
_SUBMODULES = ("flash_attn_interface", "bert_padding", "layers.rotary")

_displaced: dict[str, ModuleType] = {}


def install(force: bool = False) -> None:
    """Let `import flash_attn` find `flashtile.compat.flash_attn`. Doing it twice changes nothing.

    Raises RuntimeError if another `flash_attn` is imported already, since its functions may be held
    by modules that imported them; with `force` it is set aside for later imports, and
    `uninstall` brings it back.

        import flashtile.compat

        flashtile.compat.install()
        from flash_attn import flash_attn_func
    """
    if _is_installed():
        return
    present = sys.modules.get(_NAME)
    if present is not None and not force:
        where = getattr(present, "__file__", None) or "no file"
        raise RuntimeError(
            f"{_NAME} {getattr(present, '__version__', '')} is imported already, from {where}; "
            f"install flashtile.compat before it, or pass force=True to set it aside"
        )
    for submodule in _SUBMODULES:
        importlib.import_module(f"{_OURS}.{submodule}")
    _displaced.update(_take_out())
    for name, module in _below(_OURS).items():
        sys.modules[_NAME + name.removeprefix(_OURS)] = module


def uninstall() -> None:
    """Undo `install`: what was under `flash_attn` before is there again."""
    if not _is_installed():
        return
    _take_out()
    sys.modules.update(_displaced)
    _displaced.clear()


def _is_installed() -> bool:
    return _OURS in sys.modules and sys.modules.get(_NAME) is sys.modules[_OURS]


def _below(name: str) -> dict[str, ModuleType]:
    """The imported modules called `name` or lying below it."""
    return {
        key: module
        for key, module in sys.modules.items()
        if key == name or key.startswith(name + ".")
    }


def _take_out() -> dict[str, ModuleType]:
    """Remove everything under `flash_attn` from sys.modules and return it."""
    taken = _below(_NAME)
    for name in taken:
        del sys.modules[name]
    return taken
