"""LoRA surgery on safetensors checkpoints: extract, merge and unmerge without building the model."""

__version__ = "0.1.0"
