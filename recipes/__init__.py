"""Programs (on top) and what they share (in the subfolders). No other package imports them."""

import sys
from pathlib import Path

from codec.program import catch_interrupts

# A recipe's imports take seconds; an interrupt during them is one line as well.
_main = getattr(sys.modules["__main__"], "__file__", None)
if _main is not None and Path(__file__).parent in Path(_main).resolve().parents:
    catch_interrupts()
