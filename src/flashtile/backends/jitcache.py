"""Triton's cache of compiled kernels: a first compile says so, a damaged entry is rebuilt.

Triton 3.6 to 3.9 trust an entry whose index is there. A binary cut short by a full disk is read as
it is and fails when the GPU loads it, in every process from then on; metadata cut short raise
JSONDecodeError in 3.6. Here an entry is checked before it is read, and what passes the check and
still does not load is compiled anew, once.
"""

from __future__ import annotations

import json
import logging
import pkgutil
import struct
import threading
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from triton import JITFunction, knobs
from triton.runtime.cache import FileCacheManager
from triton.runtime.errors import OutOfResources

from flashtile import kernels

T = TypeVar("T")

logger = logging.getLogger("flashtile")

BINARIES = (".cubin", ".hsaco")

_lock = threading.RLock()


@cache
def settle_keys() -> None:
    """Ask for the keys of all functions of the package in one order, before anything is compiled.

    Triton (3.6 to 3.9) merges the constants that a function reads into its caller's key only where
    the function's own key is known by then, so that keys depend on what a process compiled before:
    a backward compiled ahead was compiled again behind its forward. Takes 0.1 s, once a process.
    """
    if knobs.runtime.interpret:
        return  # interpreted functions have no keys
    for module in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        try:
            names = vars(import_module(module.name))
        except ImportError:  # Gluon is not in every build of Triton
            continue
        for function in names.values():
            if isinstance(function, JITFunction):
                function.cache_key  # noqa: B018, a property that keeps what it finds


def launch_healing(call: Callable[[], T], kernel: Any) -> T:
    """`call()`, which launches a configuration of `kernel` for the first time in this process.

    It is called again if what it read from the cache does not load: a kernel that was not loaded
    was not launched. A cache manager of the user's own is left alone.
    """
    with _lock:
        settle_keys()
        if knobs.cache.manager_class is not None:
            return call()
        read: list[Path] = []
        knobs.cache.manager_class = partial(CheckedCache, read=read)
        try:
            return call()
        except Exception as error:
            if not read or not _while_loading(error):
                raise
            logger.warning("%s does not load, compiling it anew: %s", kernel.__name__, error)
            for path in read:
                path.unlink(missing_ok=True)
            kernel.device_caches.clear()  # Triton keeps the kernel that did not load
            return call()
        finally:
            del knobs.cache.manager_class


class CheckedCache(FileCacheManager):
    """Triton's cache folder of one kernel. A damaged entry is as good as none: Triton compiles and
    replaces its files one by one, each atomically, whatever other processes do meanwhile."""

    def __init__(
        self, key: str, override: bool = False, dump: bool = False, *, read: list[Path]
    ) -> None:
        try:
            super().__init__(key, override=override, dump=dump)
        except (OSError, RuntimeError) as wrong:  # the latter where the variable is empty
            if dump:
                raise
            folder = f"Triton cannot keep kernels in {knobs.cache.dir!r}: {wrong}"
            raise OSError(f"{folder}; set TRITON_CACHE_DIR to a folder to write to") from wrong
        self.read = read  # indices of the entries that were read

    def get_group(self, filename: str) -> dict[str, str] | None:
        """The files of a compiled kernel by name, or None where they must be made."""
        index = Path(self.cache_dir, f"__grp__{filename}")
        name = Path(filename).stem
        if not index.exists():
            logger.warning("compiling %s, once: kept in %s", name, self.cache_dir)
            return None
        try:
            group = super().get_group(filename) or {}
        except (OSError, ValueError):  # gone or cut, in Triton 3.6; later versions return None
            group = {}
        paths = [Path(path) for path in group.values()]
        if any(path.suffix in BINARIES for path in paths) and all(map(whole, paths)):
            self.read.append(index)
            return group
        logger.warning("compiling %s anew: its entry in %s is damaged", name, self.cache_dir)
        return None


def whole(path: Path) -> bool:
    """Whether metadata or a binary is complete. What else an entry holds is for people to read."""
    try:
        if path.suffix == ".json":
            return isinstance(json.loads(path.read_bytes()), dict)
        return path.suffix not in BINARIES or _whole_elf(path)
    except (OSError, ValueError):
        return False


def _whole_elf(path: Path) -> bool:
    """Whether an ELF file reaches as far as its header says: cubin and hsaco files end with the
    table of segments or of sections."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or not header.startswith(b"\x7fELF"):
        return False
    segments, sections = struct.unpack_from("<QQ", header, 32)
    segment_bytes, segment_count, section_bytes, section_count = struct.unpack_from(
        "<HHHH", header, 54
    )
    end = max(segments + segment_bytes * segment_count, sections + section_bytes * section_count)
    return end <= path.stat().st_size


def _while_loading(error: Exception) -> bool:
    """Whether Triton raised it between reading a binary and having its function: not for a kernel
    that needs more than the GPU has, and not for anything that was launched."""
    if isinstance(error, OutOfResources):
        return False
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name == "_init_handles":
            return True
        trace = trace.tb_next
    return False
