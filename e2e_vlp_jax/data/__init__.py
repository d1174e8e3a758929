"""Data: official files -> records -> examples -> batches."""
