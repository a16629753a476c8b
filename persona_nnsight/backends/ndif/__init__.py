"""Work on an NDIF server: jobs are sent, followed, and their results taken."""
