"""What a run tells: ``telemetry`` (progress, metrics.jsonl, TensorBoard), ``lines`` at its beginning and end,
``damage`` of images."""
