"""`flashtile.compat.install` and `uninstall`."""

import importlib
import importlib.util
import pickle
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from flashtile import compat

MODULES = (
    "flash_attn",
    "flash_attn.bert_padding",
    "flash_attn.flash_attn_interface",
    "flash_attn.layers",
    "flash_attn.layers.rotary",
    "flash_attn_3",
    "flash_attn_3.flash_attn_interface",
    "flash_attn_interface",
)

SCRIPT = """
import sys
import flashtile
assert not [name for name in sys.modules if name.startswith(("flashtile.compat", "flash_attn"))]
import flashtile.compat
assert "flash_attn" not in sys.modules
flashtile.compat.install()

import flash_attn
import flash_attn.flash_attn_interface
import flash_attn_interface
from flash_attn import flash_attn_func, flash_attn_with_kvcache
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from flash_attn.flash_attn_interface import _flash_attn_forward, flash_attn_gpu
from flash_attn.layers.rotary import apply_rotary_emb
import flash_attn.layers.rotary as rotary

assert flash_attn.flash_attn_interface.flash_attn_func is flash_attn_func
assert flash_attn.layers.rotary is rotary
assert flash_attn_interface is not flash_attn.flash_attn_interface
"""


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    compat.uninstall()


def under_flash_attn() -> set[str]:
    return {name for name in sys.modules if name.split(".")[0].startswith("flash_attn")}


@pytest.fixture
def other_package() -> Iterator[ModuleType]:
    """A flash_attn of other origin with a submodule, imported before us."""
    other, submodule = ModuleType("flash_attn"), ModuleType("flash_attn.losses")
    other.__version__ = "2.6.3"
    other.__file__ = "/site-packages/flash_attn/__init__.py"
    sys.modules["flash_attn"], sys.modules["flash_attn.losses"] = other, submodule
    yield other
    for name in under_flash_attn():
        del sys.modules[name]


def test_every_import_form_in_a_fresh_process():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=120)


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_importable_and_have_a_spec(name):
    compat.install()
    module = importlib.import_module(name)
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    assert spec.origin == module.__file__


def test_version_is_of_release_2():
    compat.install()
    version = importlib.import_module("flash_attn").__version__
    assert tuple(map(int, version.split("."))) >= (2, 8, 0)


def test_twice_changes_nothing():
    compat.install()
    before = {name: sys.modules[name] for name in under_flash_attn()}
    compat.install()
    assert {name: sys.modules[name] for name in under_flash_attn()} == before


def test_uninstall_leaves_nothing():
    compat.install()
    compat.uninstall()
    assert not under_flash_attn()
    compat.uninstall()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_attn")


def test_refuses_another_flash_attn(other_package):
    with pytest.raises(RuntimeError, match=r"2\.6\.3 .*/site-packages/flash_attn.*force=True"):
        compat.install()
    assert sys.modules["flash_attn"] is other_package


def test_refuses_another_flash_attn_3():
    sys.modules["flash_attn_interface"] = other = ModuleType("flash_attn_interface")
    with pytest.raises(RuntimeError, match=r"flash_attn_interface .* is imported already"):
        compat.install()
    assert under_flash_attn() == {"flash_attn_interface"}
    compat.install(force=True)
    assert sys.modules["flash_attn_interface"] is not other
    compat.uninstall()
    assert sys.modules.pop("flash_attn_interface") is other


def test_force_sets_another_flash_attn_aside(other_package):
    before = {name: sys.modules[name] for name in under_flash_attn()}
    compat.install(force=True)
    assert importlib.import_module("flash_attn") is not other_package
    assert "flash_attn.losses" not in sys.modules
    compat.uninstall()
    assert {name: sys.modules[name] for name in under_flash_attn()} == before


def test_again_after_a_name_was_taken_away():
    compat.install()
    del sys.modules["flash_attn"]
    compat.install()
    assert importlib.import_module("flash_attn").__name__ == "flashtile.compat.flash_attn"
    compat.uninstall()
    assert not under_flash_attn()


def test_uninstall_leaves_what_took_a_name_since(other_package):
    compat.install(force=True)
    sys.modules["flash_attn"] = later = ModuleType("flash_attn")
    with pytest.raises(RuntimeError, match="imported already"):
        compat.install()
    compat.uninstall()
    assert under_flash_attn() == {"flash_attn", "flash_attn.losses"}
    assert sys.modules["flash_attn"] is later


def test_force_after_another_took_a_name():
    compat.install()
    sys.modules["flash_attn"] = later = ModuleType("flash_attn")
    compat.install(force=True)
    compat.uninstall()
    assert under_flash_attn() == {"flash_attn"}
    assert sys.modules.pop("flash_attn") is later


def test_a_name_barred_from_import_stays_barred():
    sys.modules["flash_attn"] = None
    compat.install()
    compat.uninstall()
    compat.uninstall()
    assert under_flash_attn() == {"flash_attn"}
    assert sys.modules.pop("flash_attn") is None


def test_what_is_not_there_is_an_import_error():
    compat.install()
    with pytest.raises(ModuleNotFoundError, match=r"flash_attn\.losses"):
        importlib.import_module("flash_attn.losses")


def test_functions_pickle_without_install():
    compat.install()
    function = importlib.import_module("flash_attn").flash_attn_func
    data = pickle.dumps(function)
    compat.uninstall()
    assert pickle.loads(data) is function
