"""`flash_attn` and its modules, installed for one test."""

import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest

import flashtile.compat


@pytest.fixture
def flash_attn() -> Iterator[ModuleType]:
    flashtile.compat.install()
    yield importlib.import_module("flash_attn")
    flashtile.compat.uninstall()


@pytest.fixture
def interface(flash_attn: ModuleType) -> ModuleType:
    return importlib.import_module("flash_attn.flash_attn_interface")


@pytest.fixture
def bert_padding(flash_attn: ModuleType) -> ModuleType:
    return importlib.import_module("flash_attn.bert_padding")


@pytest.fixture
def rotary(flash_attn: ModuleType) -> ModuleType:
    return importlib.import_module("flash_attn.layers.rotary")
