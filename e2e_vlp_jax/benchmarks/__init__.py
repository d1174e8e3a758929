"""What `benchmark` times: a train step, an inference, the input pipeline."""
