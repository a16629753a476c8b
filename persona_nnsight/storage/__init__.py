"""What is on disk: run directories, runs that are not finished, residuals, saved effects."""
