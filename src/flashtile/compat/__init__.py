"""Drop-in modules for code that was written against other attention packages.

`install()` puts `flashtile.compat.flash_attn` under the name `flash_attn` in `sys.modules`, and
`flashtile.compat.flash_attn_interface` and `flash_attn_3` under FlashAttention-3's two names, so
that imports of these and everything below them find flashtile. Nothing happens until it is called.
Code that asks package metadata (`importlib.metadata.version("flash-attn")`) instead of importing
sees no change: only a distribution of that name could answer it.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

__all__ = ["install", "uninstall"]

_NAMES = ("flash_attn", "flash_attn_interface", "flash_attn_3")
_MODULES = (
    "flash_attn.flash_attn_interface", "flash_attn.bert_padding", "flash_attn.layers.rotary",
    "flash_attn_interface", "flash_attn_3.flash_attn_interface",
)  # fmt: skip

_displaced: dict[str, ModuleType] = {}


def install(force: bool = False) -> None:
    """Let `import flash_attn`, `flash_attn_interface` and `flash_attn_3` find flashtile. Doing it
    twice changes nothing.

    Raises RuntimeError if another module of such a name is imported already, since its functions
    may be held by modules that imported them; with `force` it is set aside for later imports, and
    `uninstall` brings it back.

        import flashtile.compat

        flashtile.compat.install()
        from flash_attn import flash_attn_func
    """
    if all(map(_is_ours, _NAMES)):
        return
    for name in _NAMES:
        present = sys.modules.get(name)
        if not (force or present is None or _is_ours(name)):
            where = getattr(present, "__file__", None) or "no file"
            raise RuntimeError(
                f"{name} {getattr(present, '__version__', '')} is imported already, "
                f"from {where}; install flashtile.compat before it, or pass force=True to set it "
                "aside"
            )
    for wanted in _MODULES:
        importlib.import_module(f"{__name__}.{wanted}")
    _displaced.update(_take_out())
    for ours in _NAMES:
        for name, module in _below(f"{__name__}.{ours}").items():
            sys.modules[name.removeprefix(f"{__name__}.")] = module


def uninstall() -> None:
    """Undo `install`: what was under these names before is there again."""
    others = _take_out()
    sys.modules.update({**_displaced, **others})
    _displaced.clear()


def _is_ours(name: str) -> bool:
    ours = sys.modules.get(f"{__name__}.{name}")
    return ours is not None and sys.modules.get(name) is ours


def _below(name: str) -> dict[str, ModuleType]:
    """The imported modules called `name` or lying below it."""
    return {
        key: module
        for key, module in sys.modules.items()
        if key == name or key.startswith(name + ".")
    }


def _take_out() -> dict[str, ModuleType]:
    """Remove everything under these names from sys.modules; returns what is not flashtile's."""
    found = {key: module for name in _NAMES for key, module in _below(name).items()}
    others = {key: module for key, module in found.items() if not _is_ours(key)}
    for name in found:
        del sys.modules[name]
    return others
