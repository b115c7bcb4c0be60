"""Images and labels: where they come from, how they are divided, augmented, mixed and put into batches."""
