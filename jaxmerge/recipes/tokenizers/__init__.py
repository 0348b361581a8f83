"""The tokenizer of a merge: its vocabulary, the rows that embeddings get for it, its files."""

from jaxmerge.recipes.tokenizers.chat_templates import chosen_template
from jaxmerge.recipes.tokenizers.embeddings import (
    embedding_rows,
    is_named_table,
    may_be_table,
    vocabulary_keys,
    vocabulary_size,
)
from jaxmerge.recipes.tokenizers.files import TokenizerFiles, tokenizer_files
from jaxmerge.recipes.tokenizers.rows import Rows, rows_for
from jaxmerge.recipes.tokenizers.tokenizer import FILES, Tokenizer, read_json, read_tokenizer
from jaxmerge.recipes.tokenizers.vocabulary import (
    TokenRule,
    Vocabulary,
    VocabularyModel,
    plan_vocabulary,
)

__all__ = [
    "FILES",
    "Rows",
    "TokenRule",
    "Tokenizer",
    "TokenizerFiles",
    "Vocabulary",
    "VocabularyModel",
    "chosen_template",
    "embedding_rows",
    "is_named_table",
    "may_be_table",
    "plan_vocabulary",
    "read_json",
    "read_tokenizer",
    "rows_for",
    "tokenizer_files",
    "vocabulary_keys",
    "vocabulary_size",
]
