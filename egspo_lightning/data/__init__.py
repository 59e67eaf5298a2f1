"""Problems and demonstrations: where they come from, how they become tokens and batches."""
