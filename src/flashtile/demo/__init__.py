"""`flashtile demo`: a GPT learns English with either attention, and a Llama-3-8B layer is measured.

The two questions of a new user, answered on their own machine: is it the same attention, and what
does it save. `run` asks them, `train` and `layer` find the answers, `report` and `plot` show them.
"""

from flashtile.demo.run import run
from flashtile.demo.settings import LONGEST, Settings
from flashtile.demo.train import read_text

__all__ = ["LONGEST", "Settings", "read_text", "run"]
