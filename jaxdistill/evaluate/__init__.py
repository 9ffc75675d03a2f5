"""Measuring models: held-out text by domain beside the teacher, and multiple choice. One table for all of it."""

from jaxdistill.evaluate.choice import ChoiceItem, multiple_choice, read_items
from jaxdistill.evaluate.ensemble import Averaged, Ensemble, ensemble
from jaxdistill.evaluate.results import ChoiceScore, Evaluation, TextScore, format_table, table_of
from jaxdistill.evaluate.scoring import Progress, Scoring
from jaxdistill.evaluate.text import evaluate_text, excerpts, same_vocabulary

__all__ = [
    "Averaged",
    "ChoiceItem",
    "ChoiceScore",
    "Ensemble",
    "Evaluation",
    "Progress",
    "Scoring",
    "TextScore",
    "ensemble",
    "evaluate_text",
    "excerpts",
    "format_table",
    "multiple_choice",
    "read_items",
    "same_vocabulary",
    "table_of",
]
