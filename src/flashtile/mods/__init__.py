"""The variants of attention: score mods, masks and dropout, a few lines each.

A variant sees one `Tile` of the attention matrix at a time and holds what it needs beside its
derivative, so that forward and backward cannot drift apart.
"""

from flashtile.mods.functions import MaskFunction, ScoreFunction
from flashtile.mods.masks import Band, Documents, Mask, MaskByFunction, MaskTensor, Tree
from flashtile.mods.probs import Dropout
from flashtile.mods.scores import Alibi, Bias, Function, ScoreMod, Softcap
from flashtile.mods.tile import Tile

__all__ = [
    "Alibi",
    "Band",
    "Bias",
    "Documents",
    "Dropout",
    "Function",
    "Mask",
    "MaskByFunction",
    "MaskFunction",
    "MaskTensor",
    "ScoreFunction",
    "ScoreMod",
    "Softcap",
    "Tile",
    "Tree",
]
