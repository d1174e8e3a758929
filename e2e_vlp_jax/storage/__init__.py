"""Where runs and checkpoints are: a file system, or a bucket (gs://)."""
