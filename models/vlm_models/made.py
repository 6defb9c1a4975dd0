"""A folder made for the time that an object lives."""

from __future__ import annotations

import shutil
import weakref
from tempfile import mkdtemp


class MadeFolder:
    """A new temporary folder `name`, removed without a word when nothing holds this object any more."""

    def __init__(self) -> None:
        self.name = mkdtemp(prefix="vlm-made-")
        weakref.finalize(self, shutil.rmtree, self.name, ignore_errors=True)
