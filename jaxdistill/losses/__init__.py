"""Objectives: scores over the vocabulary, terms that compare them, and the chunked head that evaluates terms."""
