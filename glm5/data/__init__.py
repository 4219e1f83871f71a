"""Data: sources, corpora, token datasets with manifests, the stateless loader, and the first generated problems."""

from glm5.data.chat import chat_documents
from glm5.data.corpus import Corpus, Document, build_corpus, open_corpus
from glm5.data.loader import IGNORED, Batch, Loader, once
from glm5.data.shards import TokenDataset, TokenDocument, open_dataset, tokenize_corpus, write_dataset
from glm5.data.sources import Source, installed_sources

__all__ = [
    "IGNORED", "Batch", "Corpus", "Document", "Loader", "Source", "TokenDataset", "TokenDocument", "build_corpus",
    "chat_documents", "installed_sources", "once", "open_corpus", "open_dataset", "tokenize_corpus", "write_dataset",
]  # fmt: skip
