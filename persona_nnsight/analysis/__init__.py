"""From numbers to tables, intervals and sentences."""
