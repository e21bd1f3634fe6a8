"""The Hugging Face Hub, reached only for references that are no local paths and for push. Never imported otherwise."""
