"""Triton's cache: first compiles are said, damaged entries rebuilt, cold starts shared.

In processes of their own, since this one may have Triton in its interpreter; without a GPU, for
sm_90. A process forgets what it compiled between two reads, which is what a new process knows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

PROGRAM = '''
import json, logging, pathlib, sys
import torch, triton, triton.language as tl
from triton.runtime.driver import driver
from flashtile.backends.jitcache import launch_healing
from flashtile.compiling.offline import OfflineDriver

FAULT = b"damaged by the test"

@triton.jit
def double(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at) * 2.0)

class Utils:
    """A GPU that loads what has no FAULT in it."""
    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}
    def load_binary(self, name, binary, shared, device):
        if FAULT in binary:
            raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid")
        loaded.append(len(binary))
        return object(), object(), 16, 0, 1024

loaded, log = [], []
gpu = OfflineDriver("sm_90")
gpu.launcher_cls, gpu.utils = (lambda source, metadata: "launcher"), Utils()
driver.set_active(gpu)
handler = logging.Handler()
handler.emit = lambda line: log.append(line.getMessage())
logging.getLogger("flashtile").addHandler(handler)
x = torch.empty(64, device="meta")

def load():
    return double.warmup(x, x, 64, grid=(1,)).run

def start():
    """What a new process loads, and what it says."""
    loaded.clear(), log.clear(), double.device_caches.clear()
    assert launch_healing(load, double) == "launcher"
    assert triton.knobs.cache.manager_class is None
    return loaded + log

def damage(name, length):
    (path,) = pathlib.Path(triton.knobs.cache.dir).glob(f"*/{name}")
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + FAULT + whole[119:] if length is None else whole[:length])

results = [start()]
for name, length in json.loads(sys.argv[1]):
    damage(name, length)
    results += [start(), start()]
print(json.dumps(results))
'''

TRUNCATED = [(name, length) for name in ("double.cubin", "double.json", "__grp__double.json")
             for length in (0, 1, 100, -1)]  # fmt: skip


class Process:
    """Starts at once; `results` waits for [bytes loaded, lines of the log ...] of every start."""

    def __init__(self, folder: Path, damages: list[tuple[str, int | None]]) -> None:
        program = folder / "program.py"
        program.write_text(PROGRAM)
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(program), json.dumps(damages)], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def results(self) -> list[list[Any]]:
        out, errors = self._process.communicate(timeout=300)
        assert self._process.returncode == 0, errors
        return json.loads(out)  # type: ignore[no-any-return]


def _entry(folder: Path) -> Path:
    (binary,) = folder.glob("cache/*/double.cubin")
    return binary.parent


def test_a_truncated_entry_is_rebuilt(tmp_path: Path) -> None:
    (size, said), *rest = Process(tmp_path, TRUNCATED).results()
    entry = _entry(tmp_path)

    assert said == f"compiling double, once: kept in {entry}"
    rebuilt = f"compiling double anew: its entry in {entry} is damaged"
    assert rest == [[size, rebuilt], [size]] * len(TRUNCATED)


def test_a_binary_that_does_not_load_is_rebuilt_once(tmp_path: Path) -> None:
    (size, first), (again, *said), after = Process(tmp_path, [("double.cubin", None)]).results()

    assert size == again
    assert said[0].startswith("double does not load, compiling it anew: Triton Error [CUDA]")
    assert said[1:] == [first]
    assert after == [size]


def test_cold_processes_share_one_cache(tmp_path: Path) -> None:
    processes = [Process(tmp_path, []) for _ in range(2)]
    sizes = {process.results()[0][0] for process in processes}

    assert len(sizes) == 1
    assert Process(tmp_path, []).results() == [[sizes.pop()]]


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    process = Process(tmp_path, [])

    with pytest.raises(AssertionError, match=r"OSError: Triton cannot keep kernels in .*/cache'"):
        process.results()


KEYS = """
import sys
from flashtile.backends import hopper
from flashtile.backends.jitcache import settle_keys
from flashtile.kernels.hopper import backward, forward

if "settled" in sys.argv:
    settle_keys()
kernels = {"f": forward.attention_forward, "b": backward.attention_backward}
keys = {name: kernels[name].cache_key for name in sys.argv[1]}
print(keys["b"], keys["f"])
"""


def test_keys_do_not_depend_on_what_ran_before() -> None:
    """Without settling they do, in Triton 3.6 to 3.9: once they do not, it can go."""

    def keys(*arguments: str) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        return subprocess.run(
            [sys.executable, "-c", KEYS, *arguments], env=environment, text=True, check=True,
            capture_output=True, timeout=120,
        ).stdout  # fmt: skip

    assert keys("fb", "settled") == keys("bf", "settled")
    assert keys("fb") != keys("bf")
