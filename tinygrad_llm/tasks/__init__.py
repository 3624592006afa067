"""What a model is trained to do: a task turns text into batches and a batch into a loss."""
