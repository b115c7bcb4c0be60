"""The table of all keys, with which docs/configuration.md ends. To write it anew after a key has changed:

python tests/key_table.py
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from asib_jax.recipe import Recipe, keys

DOCUMENT = ROOT / "docs" / "configuration.md"


def rewritten(text: str) -> str:
    """The document with the table as the keys are now."""
    table = keys.table(Recipe())
    return text[: text.index(table.partition("\n")[0])] + table


if __name__ == "__main__":
    DOCUMENT.write_text(rewritten(DOCUMENT.read_text()))
