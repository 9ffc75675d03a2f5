"""Making a model smaller by what its parts contribute."""
