"""Checkpoints: our own format, converters of the published ones, and comparison with recorded outputs."""

from triptych.checkpoints.errors import CheckpointError
from triptych.checkpoints.folder import Loaded, load, load_folder, push, save_folder

__all__ = ["CheckpointError", "Loaded", "load", "load_folder", "push", "save_folder"]
