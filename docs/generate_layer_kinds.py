"""Write lorasurgery/clients/layer_kinds.py: the layers of transformers' models whose kind their names tell wrongly.

python docs/generate_layer_kinds.py     # two minutes; every model class that can be built small
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
TARGET = ROOT / "lorasurgery" / "clients" / "layer_kinds.py"
HEAD = '''"""Layers of known models whose kind names alone tell wrongly (transformers {version}).

Written by docs/generate_layer_kinds.py. A row is a model type, a kind as PEFT sees it, and endings of paths, numbers
as `*`. They are for machines without transformers, and for dry runs; elsewhere the class itself is asked.
"""

from __future__ import annotations

from typing import cast

from lorasurgery.adapters.model_names.skeleton import Kind

# fmt: off
_ROWS = """
{rows}
"""
# fmt: on


def ending_of(path: str, parts: int) -> str:
    """The last parts of a path, numbers as `*`.

    >>> ending_of("h.3.attn.out_proj", 2)
    'attn.out_proj'
    """
    return ".".join("*" if p.isdigit() else p for p in path.split(".")[-parts:])


KINDS: dict[str, dict[str, Kind]] = {{}}
for _row in _ROWS.replace("\\n ", " ").strip().splitlines():
    _model, _kind, *_endings = _row.split()
    KINDS.setdefault(_model, {{}}).update(dict.fromkeys(_endings, cast(Kind, _kind)))
'''


def main() -> None:
    """Build every class on no device at all and compare what names tell with what it is."""
    import architectures
    import transformers

    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for one in architectures.every():
        try:
            model = architectures.model_of(one)
        except Exception:
            continue
        for kind, ending in exceptions(model, model.config.model_type):
            found[model.config.model_type, kind].add(ending)
    rows = [" ".join((*key, *sorted(endings))) for key, endings in sorted(found.items())]
    text = "\n".join(textwrap.fill(r, 118, subsequent_indent="  ", break_long_words=False) for r in rows)
    TARGET.write_text(HEAD.format(version=transformers.__version__, rows=text))
    print(f"{TARGET}: {len(rows)} rows")


def exceptions(model: Any, model_type: str) -> set[tuple[str, str]]:
    """(kind, ending) of the matrices of a model that names tell wrongly, by endings that mean no other kind in it."""
    from lorasurgery.adapters.model_names.library import Installed
    from lorasurgery.adapters.model_names.skeleton import skeleton_from
    from lorasurgery.clients.host import Host
    from lorasurgery.clients.layer_kinds import ending_of, told_by_name

    skeleton = skeleton_from(model, "here")
    host = Host({"model_type": model_type}, frozenset(), Installed(skeleton, lambda name: name))
    matrices = [
        n.removesuffix(".weight") for n, t in model.state_dict().items() if n.endswith(".weight") and t.ndim == 2
    ]
    kinds = {path: host.kind(path) for path in matrices if not re.search(r"\.experts\.", path)}
    found = set()
    for path, kind in kinds.items():
        if kind is None or told_by_name(path, model_type) == kind:
            continue
        for parts in (2, 3, 4):
            ending = ending_of(path, parts)
            if {k for p, k in kinds.items() if ending_of(p, parts) == ending} == {kind}:
                found.add((kind, ending))
                break
    return found


if __name__ == "__main__":
    main()
