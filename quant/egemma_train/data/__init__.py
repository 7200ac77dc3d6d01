"""Rows of files, judged one by one, and the batches that a step sees."""
