"""The tasks by name."""

from __future__ import annotations

from .base import Task as Task
from .causal_lm import CausalLM
from .question_answering import QuestionAnswering
from .seq2seq import Seq2Seq
from .sequence_classification import SequenceClassification
from .token_classification import TokenClassification

TASKS: dict[str, type[Task]] = {
    t.name: t for t in (SequenceClassification, TokenClassification, QuestionAnswering, CausalLM, Seq2Seq)
}
