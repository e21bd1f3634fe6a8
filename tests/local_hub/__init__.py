"""A Hugging Face Hub on this machine, for the tests and the examples; `python tests/local_hub` starts one."""

from local_hub.server import LocalHub

__all__ = ["LocalHub"]
