"""quantbench: which change to pretraining makes a language model survive INT8 and INT4, and why."""

__version__ = "0.1.0"
