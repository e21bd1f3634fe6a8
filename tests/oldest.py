"""What works without torch, on the oldest Python that is supported: help, and every plan and dry run.

    python3.10 tests/oldest.py

Whether the syntax and the standard library's names are those of that Python, `make types` and `make lint` hold for all
files; here the files are compiled and the half of them that a plan needs is run.
"""

from __future__ import annotations

import compileall
import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIDE, RANK = 8, 2
COMMANDS = "extract plan merge unmerge switch blend rerank convert inspect check diff verify push".split()


def save(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of float32 zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    file.parent.mkdir(parents=True)
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def make(top: Path) -> None:
    """A base, a tuned model like it, and a PEFT adapter for both."""
    modules = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qkvo"]
    for name in ("base", "tuned"):
        save(top / name / "model.safetensors", {f"{m}.weight": (SIDE, SIDE) for m in modules})
        (top / name / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2}))
    factors = {"A": (RANK, SIDE), "B": (SIDE, RANK)}
    keys = {f"base_model.model.{m}.lora_{x}.weight": shape for m in modules for x, shape in factors.items()}
    save(top / "adapter" / "adapter_model.safetensors", keys)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": [f"{x}_proj" for x in "qkvo"]}
    (top / "adapter" / "adapter_config.json").write_text(json.dumps(config))


def main() -> int:
    """Compile and run; status 1 when anything failed."""
    if not compileall.compile_dir(str(ROOT / "lorasurgery"), quiet=1, force=True):
        return 1
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        todo = [[name, "--help"] for name in COMMANDS] + [
            words.split()
            for words in (
                "plan base --rank 4", "inspect base", "inspect adapter", "check adapter --for vllm",
                "extract base tuned -o out --rank 2 --dry-run", "merge base adapter -o out --dry-run",
                "blend adapter adapter -o out --dry-run", "rerank adapter --rank 1 -o out --dry-run",
                "convert adapter --to peft --base base -o out --dry-run",
            )
        ]  # fmt: skip
        for words in todo:
            done = subprocess.run([sys.executable, "-W", "error", "-m", "lorasurgery", *words], cwd=folder,
                                  capture_output=True, text=True)  # fmt: skip
            if done.returncode:
                print(f"lorasurgery {' '.join(words)}: {done.stderr.strip()}")
                return 1
    print(f"Python {sys.version.split()[0]}: all files compile, {len(todo)} commands without torch ran")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
