"""Data for every stage: where it comes from, how it is tokenised, stored, and mixed into batches."""
