"""Checkpoints: of a run (`run`: exact resume, on any mesh and number of processes) and of a model (`model`)."""
