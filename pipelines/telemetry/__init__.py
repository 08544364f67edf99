"""What a run tells while it runs and afterwards: progress, its record, the flow of pieces."""
