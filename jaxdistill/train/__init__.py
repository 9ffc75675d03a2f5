"""The training job: everything around the pure step — models, data, mesh, checkpoints, logging and time."""
